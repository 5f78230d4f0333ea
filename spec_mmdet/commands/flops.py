"""Parameters of configs' detectors and multiply-adds of their backbones, as a Markdown table.

    spec-mmdet flops xcit_maskrcnn [CONFIG ...]

Multiply-adds (what papers call FLOPs) are those of one image of 800 x 1216 through the backbone, its pyramid included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from torch.utils.flop_counter import FlopCounterMode

from ..configs import find_config
from .common import parser

SIZE = (800, 1216)


@torch.no_grad()
def count(cfg: Config) -> tuple[int, int, int]:
    """The parameters of a config's detector and of its backbone, and the multiply-adds of the backbone."""
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    parameters = (sum(p.numel() for p in part.parameters()) for part in (model, model.backbone))
    with FlopCounterMode(display=False) as counter:
        model.backbone(torch.randn(1, 3, *SIZE))
    return *parameters, counter.get_total_flops() // 2


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('flops', __doc__)
    options.add_argument('configs', nargs='+', metavar='CONFIG')
    configs = [find_config(name) for name in options.parse_args(argv).configs]
    MMLogger.get_current_instance().setLevel('ERROR')
    register_all_modules()
    print('| config | detector, M parameters | backbone, M parameters | backbone, G multiply-adds |\n|---|---|---|---|')
    for path in configs:
        parameters, own, multiply_adds = count(Config.fromfile(path))
        print(f'| `{path.name}` | {parameters / 1e6:.1f} | {own / 1e6:.1f} | {multiply_adds / 1e9:.0f} |', flush=True)
