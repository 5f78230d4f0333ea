"""Write the demo's data set of generated shapes: real detection work that a laptop's CPU can learn.

    spec-mmdet shapes data/shapes

The same seed writes the same files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data.shapes import write_split
from ..files import write_folder_atomically
from .common import parser


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('shapes', __doc__)
    options.add_argument('root', type=Path, help='folder to write')
    options.add_argument('--train', type=int, default=1800, help='training images')
    options.add_argument('--val', type=int, default=150, help='validation images')
    options.add_argument('--size', type=int, default=256, help='height and width of the images in pixels')
    options.add_argument('--seed', type=int, default=0)
    args = options.parse_args(argv)
    with write_folder_atomically(args.root) as aside:
        for i, (split, images) in enumerate(dict(train=args.train, val=args.val).items()):
            write_split(aside, split, images, args.size, np.random.default_rng([args.seed, i]))
    print(f'{args.root}: {args.train} training and {args.val} validation images of {args.size} pixels')
