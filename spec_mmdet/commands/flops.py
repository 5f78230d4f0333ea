"""Print a Markdown table of the parameters of configs' detectors and the multiply-adds of their backbones.

    spec-mmdet flops xcit_maskrcnn [CONFIG ...]

Multiply-adds (often called FLOPs in papers) are for one image of 800 x 1216 and include the backbone's feature pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..status import show_status
from .common import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('flops', __doc__)
    options.add_argument('configs', nargs='+', metavar='CONFIG', help='a config file, or the name of a shipped config')
    args = options.parse_args(argv)

    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from ..configs import find_config, read_config
    from ..training.speed import count_multiply_adds

    configs = [find_config(name) for name in args.configs]
    MMLogger.get_current_instance().setLevel('ERROR')
    register_all_modules()
    print('| config | detector, M parameters | backbone, M parameters | backbone, G multiply-adds |\n|---|---|---|---|')
    for path in configs:
        with show_status(f'counting {path.stem}'):
            detector, backbone, multiply_adds = count_multiply_adds(read_config(path))
        print(
            f'| `{path.name}` | {detector / 1e6:.1f} | {backbone / 1e6:.1f} | {multiply_adds / 1e9:.0f} |', flush=True
        )
