"""Make a folder of a trained detector that others can use: weights alone, config, model card and checksums.

    spec-mmdet publish work_dirs/mine/epoch_36.pth --licence CC-BY-4.0 [--out DIR]

DIR (default: `published`, beside the checkpoint) gets `model.pth` and `model.safetensors`, the weights (averages, where
the training kept them) without optimiser and history; `config.py`, whole, with the classes; `README.md`, the model
card: data, AP, conditioning, licence, command and commit, each as far as it is known; and `SHA256SUMS`, which
`sha256sum --check SHA256SUMS` reads. AP is that of the training's validation (`results.csv`) at the checkpoint's epoch.
Before anything is written, the weights are loaded into the config's model, where all must fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .common import parser


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('publish', __doc__)
    options.add_argument('checkpoint', type=Path, help='a checkpoint of the detector')
    options.add_argument('--config', type=Path, help='its config (default: the one beside it)')
    options.add_argument('--out', type=Path, help='a folder that is empty or new (default: published, beside it)')
    options.add_argument('--name', help="name of the model (default: the config's)")
    options.add_argument('--licence', help='the licence for other users, for instance CC-BY-4.0')
    args = options.parse_args(argv)

    from ..inference.publishing import publish

    out = args.out or args.checkpoint.parent / 'published'
    sums, ap = publish(args.checkpoint, args.config, out, args.name, args.licence)
    print(sums, end='')
    if not args.licence:
        print('no --licence: the card says that it is not stated')
    if not ap:
        print(f'no results of this epoch beside {args.checkpoint}: the card says that AP is not known')
    print(f'wrote {out}')
