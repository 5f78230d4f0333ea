"""Write a folder of a trained detector for other users: weights, config, model card and checksums.

    spec-mmdet publish work_dirs/mine/epoch_36.pth --licence CC-BY-4.0

DIR gets

    model.pth, model.safetensors  weights (moving averages, if the training kept them), without optimiser and history
    config.py                     complete config with the classes
    README.md                     model card: data and weights with digests, AP, conditioning, licence, command, commit
    SHA256SUMS                    for `sha256sum --check SHA256SUMS`

AP is from the training's validation of these weights (`results.csv`); a checkpoint within an epoch has none. Before
anything is written, the command checks that all weights fit the config's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..status import show_status
from .common import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('publish', __doc__)
    options.add_argument('checkpoint', type=Path, help='checkpoint of the detector')
    options.add_argument('--config', type=Path, help='config of the training (default: the one next to the checkpoint)')
    options.add_argument('--out', type=Path, help='new or empty folder (default: published, next to the checkpoint)')
    options.add_argument('--name', help="name of the model (default: the config's)")
    options.add_argument('--licence', help='licence for other users, for instance CC-BY-4.0 (default: not specified)')
    args = options.parse_args(argv)

    from ..inference.publishing import publish

    out = args.out or args.checkpoint.parent / 'published'
    with show_status('verifying and writing the detector'):
        sums, ap = publish(args.checkpoint, args.config, out, args.name, args.licence)
    print(sums, end='')
    if not args.licence:
        print('without --licence, the model card states that the licence is not specified')
    if not ap:
        print(f'no validation of these weights next to {args.checkpoint}: the model card contains no AP')
    print(f'wrote {out}')
