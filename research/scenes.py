"""Write scenes to detect objects in, and pictures of other objects to pretrain on.

    python -m research.scenes data/scenes

OUT/detection is in COCO's layout, for `spec-mmdet train --data`; OUT/pretraining contains one folder per class, for
`spec-mmdet pretrain --data`. The same seed writes the same files.

Scenes are harder than the demo's shapes: objects occlude each other at many scales on cluttered backgrounds, and their
masks are their visible pixels. Objects come from one of two sources: drawn figures, whose category is the arrangement
of their parts together with their texture, or the garments of Fashion-MNIST (arXiv 1708.07747). In both, the detected
categories are disjoint from those of the pretraining.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.data.shapes import add_noise, describe_mask, draw_background, write_png, write_split
from spec_mmdet.errors import InputError
from spec_mmdet.files import write_folder_atomically

FIGURE = 96  # height and width of a drawn figure in pixels
MIN_VISIBLE = 0.4  # the least visible fraction of an object


class Source(Protocol):
    """A source of objects.

    Attributes:
        pretraining: names of the categories to pretrain on.
        detection: names of those to detect.
    """

    pretraining: Sequence[str]
    detection: Sequence[str]

    def draw(self, rng: np.random.Generator, category: str, split: str) -> np.ndarray:
        """Draw an object: BGR and opacity (0 or 255), uint8, shape (H, W, 4)."""


class Figures:
    """Figures of joined parts: four arrangements, each in four textures.

    Every arrangement and every texture is in two of the categories to pretrain on and in two of those to detect:
    neither predicts a category by itself.
    """

    arrangements = {
        'row': [(-1, 0), (0, 0), (1, 0)],
        'corner': [(-0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)],
        'cross': [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)],
        'ring': [(np.cos(a), np.sin(a)) for a in np.arange(6) * np.pi / 3],
    }
    joints = {
        'row': [(0, 2)],
        'corner': [(0, 1), (1, 2)],
        'cross': [(1, 2), (3, 4)],
        'ring': [(i, (i + 1) % 6) for i in range(6)],
    }
    textures = ('plain', 'striped', 'chequered', 'dotted')

    def __init__(self) -> None:
        named = [
            (a + t, f'{texture} {arrangement}')
            for a, arrangement in enumerate(self.arrangements)
            for t, texture in enumerate(self.textures)
        ]
        self.pretraining = [name for place, name in named if place % 2 == 0]
        self.detection = [name for place, name in named if place % 2]

    def draw(self, rng: np.random.Generator, category: str, split: str) -> np.ndarray:
        """Draw a figure; see :class:`Source`. Figures are drawn anew in every split."""
        texture, arrangement = category.split()
        centres = np.array(self.arrangements[arrangement]) * 0.3 * FIGURE + FIGURE / 2
        centres = np.round(centres + rng.uniform(-3, 3, centres.shape)).astype(int)
        opaque = np.zeros((FIGURE, FIGURE), np.uint8)
        for start, end in self.joints[arrangement]:
            cv2.line(opaque, tuple(map(int, centres[start])), tuple(map(int, centres[end])), 255, 7)
        round_parts, radius = rng.random() < 0.5, int(rng.integers(10, 14))
        for x, y in centres.tolist():
            if round_parts:
                cv2.circle(opaque, (x, y), radius, 255, -1)
            else:
                cv2.rectangle(opaque, (x - radius, y - radius), (x + radius, y + radius), 255, -1)
        colours = self.draw_colours(rng)
        return np.dstack([colours[self.draw_pattern(rng, texture).astype(int)], opaque])

    @staticmethod
    def draw_colours(rng: np.random.Generator) -> np.ndarray:
        """Draw two colours that differ enough to show a texture; BGR, shape (2, 3)."""
        while True:
            colours = rng.integers(20, 236, (2, 3))
            if np.abs(colours[0] - colours[1]).sum() > 200:
                return colours.astype(np.uint8)

    @staticmethod
    def draw_pattern(rng: np.random.Generator, texture: str) -> np.ndarray:
        """Draw a mask of the pixels that have the second colour."""
        y, x = np.mgrid[:FIGURE, :FIGURE]
        period = rng.integers(8, 13)
        x, y = x // (period // 2), y // (period // 2)
        if texture == 'striped':
            return x % 2 == 0
        if texture == 'chequered':
            return (x + y) % 2 == 0
        if texture == 'dotted':
            return (x % 2 == 0) & (y % 2 == 0)
        return np.zeros((FIGURE, FIGURE), bool)


class Garments:
    """The garments of Fashion-MNIST, each in one colour; its test set is used for validation.

    Args:
        folder: contains its four files, as Debian's package dataset-fashion-mnist installs them in
            /usr/share/datasets/fashion-mnist.

    Raises:
        InputError: if one of them is missing or has other contents.
    """

    names = ('T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')
    detection = ('trouser', 'dress', 'sandal', 'bag')
    pretraining = ('T-shirt', 'pullover', 'coat', 'shirt', 'sneaker', 'ankle boot')

    def __init__(self, folder: Path) -> None:
        self.images: dict[tuple[str, str], np.ndarray] = {}
        for split, prefix in dict(train='train', val='t10k').items():
            images = self.read(folder / f'{prefix}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
            labels = self.read(folder / f'{prefix}-labels-idx1-ubyte.gz', 8)
            if len(images) != len(labels):
                raise InputError(f'{folder}: {prefix} has {len(images)} images and {len(labels)} labels')
            for label, name in enumerate(self.names):
                self.images[split, name] = images[labels == label]

    @staticmethod
    def read(path: Path, header: int) -> np.ndarray:
        """Read the bytes after the header of a gzipped file in MNIST's format; the header specifies their number."""
        try:
            content = gzip.decompress(path.read_bytes())
        except (OSError, EOFError) as error:
            raise InputError(
                f'{path}: cannot be read ({error}). Fashion-MNIST is in Debian and Ubuntu: apt-get install '
                'dataset-fashion-mnist puts it into /usr/share/datasets/fashion-mnist'
            ) from error
        sizes = np.frombuffer(content[4:header], '>u4')
        if len(content) - header != np.prod(sizes, dtype=np.int64) or not len(sizes):
            raise InputError(f'{path}: is corrupt or not a file of Fashion-MNIST')
        return np.frombuffer(content, np.uint8, offset=header)

    def draw(self, rng: np.random.Generator, category: str, split: str) -> np.ndarray:
        """Draw a garment; see :class:`Source`."""
        images = self.images[split, category]
        grey = images[rng.integers(len(images))]
        # The largest connected part of the foreground; the background is zero with some specks.
        _, parts, sizes, _ = cv2.connectedComponentsWithStats((grey > 10).astype(np.uint8))
        opaque = np.where(parts == 1 + sizes[1:, cv2.CC_STAT_AREA].argmax(), 255, 0)
        coloured = (55 + grey[..., None] * (200 / 255)) * rng.uniform(0.3, 1, 3)
        figure = np.dstack([coloured, opaque]).astype(np.uint8)
        return cv2.resize(figure, None, fx=3, fy=3, interpolation=cv2.INTER_LINEAR)


def put(image: np.ndarray, figure: np.ndarray, centre: Sequence[float], length: float, angle: float) -> np.ndarray:
    """Draw an object into an image in place.

    Args:
        image: BGR, shape (H, W, 3).
        figure: see :class:`Source`.
        centre: of the object, (x, y).
        length: of its longer side, in pixels.
        angle: of its rotation, in degrees.

    Returns:
        Its mask, bool, shape (H, W).
    """
    rows, columns = (np.flatnonzero(figure[..., 3].max(axis=axis) > 127) for axis in (1, 0))
    figure = figure[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    h, w = figure.shape[:2]
    turn = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, length / max(h, w))
    turn[:, 2] += np.array(centre) - ((w - 1) / 2, (h - 1) / 2)
    size = image.shape[1::-1]
    drawn = cv2.warpAffine(figure[..., :3], turn, size, flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REPLICATE)
    there = cv2.warpAffine(figure[..., 3], turn, size, flags=cv2.INTER_LINEAR) > 127
    image[there] = drawn[there]
    return there


def make_scene(rng: np.random.Generator, size: int, source: Source, split: str) -> tuple[np.ndarray, list[dict]]:
    """Draw a scene of size x size pixels, BGR, with objects of the detected categories.

    Returns:
        The scene, and its COCO annotations without ids.
    """
    image = draw_background(rng, size)
    placed: list[tuple[int, np.ndarray, int]] = []  # category, visible mask, pixels of the complete object
    for _ in range(rng.integers(3, 9)):
        category = int(rng.integers(len(source.detection)))
        figure = source.draw(rng, source.detection[category], split)
        candidate = image.copy()
        length = size * np.exp(rng.uniform(np.log(0.15), np.log(0.5)))
        there = put(candidate, figure, rng.uniform(0.1 * size, 0.9 * size, 2), length, rng.uniform(0, 360))
        whole = int(there.sum())
        below = [(c, visible & ~there, pixels) for c, visible, pixels in placed]
        if whole < 30 or any(visible.sum() < MIN_VISIBLE * pixels for _, visible, pixels in below):
            continue
        image, placed = candidate, [*below, (category, there, whole)]
    masks = [mask_utils.encode(np.asfortranarray(visible.astype(np.uint8))) for _, visible, _ in placed]
    annotations = [
        dict(category_id=category + 1, iscrowd=0, **describe_mask(rle)) for rle, (category, _, _) in zip(masks, placed)
    ]
    return add_noise(rng, image), annotations


def make_crop(rng: np.random.Generator, size: int, source: Source, category: str, split: str) -> np.ndarray:
    """Draw a picture of size x size pixels, BGR, of one object of a category."""
    image = draw_background(rng, size)
    centre = size / 2 + rng.uniform(-0.08, 0.08, 2) * size
    put(image, source.draw(rng, category, split), centre, size * rng.uniform(0.6, 0.95), rng.uniform(0, 360))
    return add_noise(rng, image)


def write_crops(root: Path, split: str, images: int, size: int, source: Source, rng: np.random.Generator) -> None:
    """Write ``images`` pictures of single objects to root/split/CATEGORY."""
    for number in range(images):
        category = source.pretraining[number % len(source.pretraining)]
        folder = root / split / category
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f'{number:06}.png', make_crop(rng, size, source, category, split))


def write_scenes(
    root: Path, source: Source, train: int, val: int, size: int, crops: int, crop_size: int, seed: int = 0
) -> None:
    """Write root/detection and root/pretraining; both or neither.

    Args:
        root: folder to write.
        source: of the objects.
        train: number of scenes for training.
        val: number of scenes for validation.
        size: height and width of the scenes in pixels.
        crops: number of pictures for pretraining; a tenth as many are written for validation.
        crop_size: their height and width in pixels.
        seed: of the random numbers.
    """
    pictures = dict(train=crops, val=crops // 10)
    with write_folder_atomically(root) as folder:
        for i, (split, images) in enumerate(dict(train=train, val=val).items()):
            rng, make = np.random.default_rng([seed, i]), partial(make_scene, source=source, split=split)
            write_split(folder / 'detection', split, images, size, rng, make, source.detection)
            write_crops(folder / 'pretraining', split, pictures[split], crop_size, source, rng)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('research.scenes', __doc__, 'python -m')
    options.add_argument('root', type=Path, metavar='OUT', help='folder to write')
    options.add_argument('--fashion-mnist', type=Path, metavar='FOLDER', help='paste the garments of Fashion-MNIST, '
                         'whose four files are in this folder (default: drawn figures)')  # fmt: skip
    options.add_argument('--train', type=int, default=1600, help='number of scenes for training')
    options.add_argument('--val', type=int, default=400, help='number of scenes for validation')
    options.add_argument('--size', type=int, default=128, help='height and width of the scenes in pixels')
    options.add_argument('--crops', type=int, default=8000, help='number of pictures for pretraining; a tenth as many '
                         'for its validation')  # fmt: skip
    options.add_argument('--crop-size', type=int, default=48, help='their height and width in pixels')
    options.add_argument('--seed', type=int, default=0)
    args = options.parse_args(argv)
    source = Garments(args.fashion_mnist) if args.fashion_mnist else Figures()
    write_scenes(args.root, source, args.train, args.val, args.size, args.crops, args.crop_size, args.seed)
    print(f'{args.root}/detection: {args.train} training and {args.val} validation scenes of {args.size} pixels: '
          f'{", ".join(source.detection)}')  # fmt: skip
    print(f'{args.root}/pretraining: {args.crops} training and {args.crops // 10} validation pictures of '
          f'{args.crop_size} pixels: {", ".join(source.pretraining)}')  # fmt: skip


if __name__ == '__main__':
    with command_line():
        main()
