"""Pictures in one style, wherever they are drawn: masks, boxes, and labels that leave what is small to be seen."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.registry import HOOKS, VISUALIZERS
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image, ImageDraw, ImageFont

ADVICE = (
    'install a font that has them (for instance fonts-noto-cjk of Debian and Ubuntu), or one for Python alone: '
    'pip install mplfonts'
)


@cache
def letters_of(path: str) -> frozenset[int]:
    """The code points that a font file has a picture of."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # not a font that matplotlib can read
        return frozenset()


def font_for(letters: set[int]) -> tuple[str, set[int]]:
    """The name of the font that has the most of these code points, and which it lacks.

    It is matplotlib's own where that is enough, or else one of the system or of the package mplfonts.
    """
    own = 'DejaVu Sans'
    paths = {entry.fname: entry.name for entry in fontManager.ttflist if entry.name == own and entry.style == 'normal'}
    lacking = letters - letters_of(next(iter(paths)))
    if not lacking:
        return own, lacking
    package = find_spec('mplfonts')
    others = list(map(str, Path(package.origin).parent.glob('fonts/*'))) if package else []
    best = max([*findSystemFonts(), *others], key=lambda path: len(lacking & letters_of(path)), default='')
    if not lacking & letters_of(best):
        return own, lacking
    fontManager.addfont(best)  # the list of them may be older than it is
    return fontManager.ttflist[-1].name, letters - letters_of(best)


@contextmanager
def names_drawn(names: Iterable[str]) -> Iterator[None]:
    """What pictures are drawn in: nothing in a name is read as mathematics, and a font that has its letters is found.

    Letters that no font has are squares, and are told.
    """
    letters = {ord(letter) for name in names for letter in name if not letter.isspace()}
    font, lacking = font_for(letters)
    if lacking:
        some = ' '.join(sorted(map(chr, lacking))[:20])
        print(f'warning: {len(lacking)} letters of the names of classes are squares on pictures ({some}): {ADVICE}')
    families = [font, *matplotlib.rcParams['font.sans-serif']]
    with matplotlib.rc_context({'text.parse_math': False, 'font.sans-serif': families}):
        yield


@dataclass
class Mark:
    """What is drawn of an object.

    Attributes:
        box: x0, y0, x1, y1 in pixels.
        text: its label.
        colour: red, green and blue, 0 to 255.
        mask: shape (H, W), bool; None where there is none.
        dashed: whether the box is.
    """

    box: Sequence[float]
    text: str
    colour: tuple[int, int, int]
    mask: np.ndarray | None = None
    dashed: bool = False


def colour_of(label: int) -> tuple[int, int, int]:
    """The colour of a class: the first ones are far from each other, and each has another hue."""
    hue = (0.6 + label * 0.618034) % 1  # steps of the golden ratio keep apart
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.45, 0.8))


def label_of(name: str, score: float | None = None) -> str:
    """A label: the class, and how sure the detector is, as 0.53."""
    return name if score is None else f'{name} {score:.2f}'


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """How many pixels two boxes have in common."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def place(
    text: tuple[float, float], box: Sequence[float], others: Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[float, float]:
    """Where a label covers least: above its box, below, beside it, or in its corner; its left upper corner.

    Args:
        text: the label's width and height.
        box: the object's.
        others: boxes to be left free, its own and other labels among them.
        size: the picture's width and height.
    """
    (w, h), (x0, y0, x1, y1) = text, box
    spots = [(x0, y0 - h), (x0, y1), (x1, y0), (x0 - w, y0), (x1 - w, y0 - h), (x1 - w, y1), (x0, y0)]
    inside = [(min(max(x, 0), max(0, size[0] - w)), min(max(y, 0), max(0, size[1] - h))) for x, y in spots]

    def covered(spot: tuple[float, float]) -> float:
        here = (*spot, spot[0] + w, spot[1] + h)
        # Of a small box, a pixel is worth more.
        return sum(overlap(here, other) / (1 + (other[2] - other[0]) * (other[3] - other[1])) for other in others)

    return min(inside, key=covered)


def draw(image: np.ndarray, marks: Sequence[Mark], scale: float = 1, title: str = '') -> np.ndarray:
    """Draw objects on an image.

    Args:
        image: shape (H, W, 3), RGB, 0 to 255.
        marks: the objects; the last ones lie on top.
        scale: how much larger the picture is than the image.
        title: a line above the picture.

    Returns:
        Shape (scale * H, scale * W, 3), higher by the title where there is one, uint8.
    """
    image = np.asarray(image).clip(0, 255).astype(np.uint8)
    for mark in marks:
        if mark.mask is not None:
            image = image.copy()
            image[mark.mask] = 0.6 * image[mark.mask] + 0.4 * np.array(mark.colour)
    if scale != 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    line = max(1, round(min(height, width) / 250))
    font = font_of(int(np.clip(min(height, width) / 32, 10, 28)))
    boxes = [[scale * float(edge) for edge in mark.box] for mark in marks]
    for mark, (x0, y0, x1, y1) in zip(marks, boxes):
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
        for start, end in zip(corners, corners[1:]):
            for a, b in dashes(start, end, 5 * line) if mark.dashed else [(start, end)]:
                pen.line([a, b], mark.colour, line)
    taken = list(boxes)
    for mark, box in zip(marks, boxes):
        if not mark.text:
            continue
        left, top, right, bottom = font.getbbox(mark.text)
        text = right - left + 4, bottom - top + 4
        x, y = place(text, box, taken, (width, height))
        taken.append([x, y, x + text[0], y + text[1]])
        pen.rectangle([x, y, x + text[0] - 1, y + text[1] - 1], mark.colour)
        bright = np.dot(mark.colour, (0.299, 0.587, 0.114)) > 150
        pen.text((x + 2 - left, y + 2 - top), mark.text, 'black' if bright else 'white', font)
    return np.vstack([headline(title, width), np.asarray(picture)]) if title else np.asarray(picture)


def headline(text: str, width: int) -> np.ndarray:
    """A line of text on white, as wide as a picture, cut off where it is longer."""
    font = font_of(14)
    strip = Image.new('RGB', (width, 22), 'white')
    while text and font.getlength(text) > width - 8:
        text = text[:-2].rstrip('…') + '…' if len(text) > 2 else ''
    ImageDraw.Draw(strip).text((4, 2), text, '#1f2937', font)
    return np.asarray(strip)


def dashes(start: tuple[float, float], end: tuple[float, float], length: float) -> Iterator[tuple]:
    """The parts of a dashed line."""
    start, end = np.array(start), np.array(end)
    count = max(1, round(np.linalg.norm(end - start) / length / 2))
    for i in range(count):
        first, last = start + (end - start) * i / count, start + (end - start) * (i + 0.5) / count
        yield tuple(first), tuple(last)


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """The font of :func:`names_drawn`."""
    return ImageFont.truetype(findfont(FontProperties(family=matplotlib.rcParams['font.sans-serif'])), size)


def tiled(pictures: Sequence[np.ndarray], columns: int = 4, gap: int = 8) -> np.ndarray:
    """Pictures in rows, each with white beside and below it up to the size of the largest."""
    height, width = (max(picture.shape[axis] for picture in pictures) + gap for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    whole = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * height, gap + i % columns * width
        whole[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return whole


def marks_of(instances: InstanceData, classes: Sequence[str] | None, least: float = 0) -> list[Mark]:
    """What is drawn of MMDetection's instances, the surest last.

    Args:
        instances: with bboxes and labels, and scores and masks where there are some.
        classes: the names of the labels.
        least: of the score.
    """
    instances = instances.cpu()
    masks = instances.get('masks')
    if isinstance(masks, BitmapMasks | PolygonMasks):
        masks = masks.to_ndarray()
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    labels = np.asarray(instances.labels)
    scores = np.asarray(instances.scores) if 'scores' in instances else None
    marks = []
    for i in range(len(labels)) if scores is None else np.argsort(scores, kind='stable'):
        if scores is not None and scores[i] < least:
            continue
        name = classes[labels[i]] if classes is not None else f'class {labels[i]}'
        mask = None if masks is None else np.asarray(masks[i], bool)
        text = label_of(name, None if scores is None else float(scores[i]))
        marks.append(Mark(np.asarray(boxes[i]), text, colour_of(int(labels[i])), mask))
    return marks


@VISUALIZERS.register_module()
class LabelVisualizer(DetLocalVisualizer):
    """MMDetection's DetLocalVisualizer, with this package's style of boxes, masks and labels."""

    def _draw_instances(
        self, image: np.ndarray, instances: InstanceData, classes: list[str] | None, palette: object
    ) -> np.ndarray:
        return draw(image, marks_of(instances, classes))


@HOOKS.register_module()
class PictureHook(DetVisualizationHook):
    """MMDetection's DetVisualizationHook, which draws images of the same name in two folders into two folders."""

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """Draw the predictions, each in the place that its image has below the data set's image folder."""
        top = self.test_out_dir
        if top is None:
            super().after_test_iter(runner, batch_idx, data_batch, outputs)
            return
        root = (getattr(runner.test_dataloader.dataset, 'data_prefix', None) or {}).get('img', '')
        for sample in outputs:
            place = os.path.relpath(os.path.dirname(sample.img_path), root) if root else '.'
            self.test_out_dir = os.path.normpath(os.path.join(top, '.' if place.startswith('..') else place))
            super().after_test_iter(runner, batch_idx, data_batch, [sample])
        self.test_out_dir = top
