"""Write scenes to detect objects in, and pictures of other objects to pretrain on.

    spec-mmdet scenes data/scenes

OUT/detection is in COCO's layout, for train --data; OUT/pretraining holds folders by class, for pretrain --data. The
same seed writes the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..data.scenes import Figures, Garments, make_scene, write_crops
from ..data.shapes import write_split
from ..files import write_folder_atomically
from .common import parser


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('scenes', __doc__)
    options.add_argument('root', type=Path, metavar='OUT', help='folder to write')
    options.add_argument('--fashion-mnist', type=Path, metavar='FOLDER', help='paste the garments of Fashion-MNIST, '
                         'whose four files are in this folder (default: figures that are drawn)')  # fmt: skip
    options.add_argument('--train', type=int, default=1600, help='scenes to train on')
    options.add_argument('--val', type=int, default=400, help='scenes to validate on')
    options.add_argument('--size', type=int, default=128, help='height and width of the scenes in pixels')
    options.add_argument('--crops', type=int, default=8000, help='pictures to pretrain on; a tenth more validate')
    options.add_argument('--crop-size', type=int, default=48, help='their height and width in pixels')
    options.add_argument('--seed', type=int, default=0)
    args = options.parse_args(argv)
    source = Garments(args.fashion_mnist) if args.fashion_mnist else Figures()
    crops = dict(train=args.crops, val=args.crops // 10)
    with write_folder_atomically(args.root) as aside:
        for i, (split, images) in enumerate(dict(train=args.train, val=args.val).items()):
            rng, make = np.random.default_rng([args.seed, i]), partial(make_scene, source=source, split=split)
            write_split(aside / 'detection', split, images, args.size, rng, make, source.detection)
            write_crops(aside / 'pretraining', split, crops[split], args.crop_size, source, rng)
    print(f'{args.root}/detection: {args.train} scenes to train on, {args.val} to validate on, of {args.size} pixels, '
          f'with {", ".join(source.detection)}')  # fmt: skip
    print(f'{args.root}/pretraining: {crops["train"]} and {crops["val"]} pictures of {args.crop_size} pixels, of '
          f'{", ".join(source.pretraining)}')  # fmt: skip
