"""Draw masks, boxes and labels in one style, with labels placed where they hide least."""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import INSTANCE_OFFSET
from mmdet.registry import HOOKS, VISUALIZERS
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmdet.visualization import DetLocalVisualizer
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from PIL import Image, ImageDraw, ImageFont

ADVICE = (
    'install a font that contains them, for instance fonts-noto-cjk on Debian and Ubuntu, or run: pip install mplfonts'
)
MAX_CELLS = 2**22  # cells of the map for placing labels


@cache
def list_letters(path: str) -> frozenset[int]:
    """Return the code points for which a font file has a glyph."""
    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):  # not a font that matplotlib can read
        return frozenset()


def find_font(letters: set[int]) -> tuple[str, set[int]]:
    """Find the font that contains most of these code points.

    Matplotlib's own font is preferred; others come from the system or the package mplfonts.

    Returns:
        The font's name, and the code points that it lacks.
    """
    default = 'DejaVu Sans'
    paths = {
        entry.fname: entry.name for entry in fontManager.ttflist if entry.name == default and entry.style == 'normal'
    }
    lacking = letters - list_letters(next(iter(paths)))
    if not lacking:
        return default, lacking
    package = find_spec('mplfonts')
    others = list(map(str, Path(package.origin).parent.glob('fonts/*'))) if package else []
    best = max([*findSystemFonts(), *others], key=lambda path: len(lacking & list_letters(path)), default='')
    if not lacking & list_letters(best):
        return default, lacking
    fontManager.addfont(best)  # matplotlib's list of fonts may be older than the file
    return fontManager.ttflist[-1].name, letters - list_letters(best)


@contextmanager
def use_font_for(names: Iterable[str]) -> Iterator[None]:
    """Disable mathtext, and use a font that contains the letters of ``names``; warn if some have no glyph."""
    letters = {ord(letter) for name in names for letter in name if not letter.isspace()}
    font, lacking = find_font(letters)
    if lacking:
        shown = ' '.join(sorted(map(chr, lacking))[:20])
        print(f'warning: no font contains {len(lacking)} letters of the class names ({shown}): {ADVICE}')
    families = [font, *matplotlib.rcParams['font.sans-serif']]
    with matplotlib.rc_context({'text.parse_math': False, 'font.sans-serif': families}):
        yield


@dataclass
class Mark:
    """Drawing of an object.

    Attributes:
        box: x0, y0, x1, y1 in pixels; None for that of the mask.
        text: its label; '' for none.
        colour: red, green and blue, 0 to 255.
        mask: shape (H, W), bool, or None; cropped to its bounding box.
        dashed: whether the box's lines are dashed.
        framed: whether the box is drawn; otherwise the edge of the mask is.
        corner: x and y of the cropped mask's left upper corner.
    """

    box: Sequence[float] | None
    text: str
    colour: tuple[int, int, int]
    mask: np.ndarray | None = None
    dashed: bool = False
    framed: bool = True
    corner: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        if self.mask is not None:
            mask = np.asarray(self.mask, bool)
            ys, xs = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            self.corner = (int(xs[0]), int(ys[0])) if len(xs) else (0, 0)
            self.mask = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].copy() if len(xs) else None
            if self.box is None:
                self.box = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1) if len(xs) else (0, 0, 0, 0)


def choose_colour(label: int) -> tuple[int, int, int]:
    """Return the colour of a class, RGB, 0 to 255; all hues differ, the first ones clearly."""
    hue = (0.6 + label * 0.618034) % 1  # the golden ratio spreads the hues
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, 0.45, 0.8))


def to_rgb_bytes(colour: str) -> tuple[int, int, int]:
    """Return a colour of matplotlib as red, green and blue, 0 to 255."""
    return tuple(round(255 * part) for part in to_rgb(colour))


def format_label(name: str, score: float | None = None) -> str:
    """Return a label's text: the class and its score with two decimals."""
    return name if score is None else f'{name} {score:.2f}'


class LabelPlacer:
    """Placer of labels where they hide least, in a time that does not depend on the number of objects.

    Args:
        boxes: x0, y0, x1, y1 of all objects.
        size: the picture's width and height.
    """

    def __init__(self, boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> None:
        self.size = size
        self.cell = math.ceil(math.sqrt(size[0] * size[1] / MAX_CELLS))  # pixels that a cell is wide and high
        width, height = (math.ceil(length / self.cell) for length in size)
        # Weight per pixel of each cell: cumulative sums of the changes at the corners of the boxes.
        changes = np.zeros((height + 1, width + 1))
        for box in boxes:
            x0, y0, x1, y1 = self._cells(box)
            worth = weigh(box)
            changes[[y0, y1], [x0, x1]] += worth
            changes[[y0, y1], [x1, x0]] -= worth
        self.worth = changes.cumsum(axis=0).cumsum(axis=1)[:-1, :-1].copy()

    def _cells(self, box: Sequence[float]) -> list[int]:
        """Return a box's first and last columns and rows of cells as x0, y0, x1, y1, within the picture."""
        ends = [math.ceil(length / self.cell) for length in self.size] * 2
        return [min(max(round(float(edge) / self.cell), 0), end) for edge, end in zip(box, ends)]

    def place(self, text: tuple[float, float], box: Sequence[float]) -> tuple[float, float]:
        """Place a label above, below, beside or inside its box; return its left upper corner. Later labels avoid it.

        Args:
            text: the label's width and height.
            box: the object's box.
        """
        (w, h), (x0, y0, x1, y1) = text, box
        spots = [(x0, y0 - h), (x0, y1), (x1, y0), (x0 - w, y0), (x1 - w, y0 - h), (x1 - w, y1), (x0, y0)]
        right, bottom = max(0, self.size[0] - w), max(0, self.size[1] - h)
        inside = [(min(max(x, 0), right), min(max(y, 0), bottom)) for x, y in spots]
        labels = [(x, y, x + w, y + h) for x, y in inside]
        best = min(labels, key=lambda label: round(float(self._cover(label).sum()), 9))
        self._cover(best)[:] += weigh(best)
        return best[:2]

    def _cover(self, box: Sequence[float]) -> np.ndarray:
        x0, y0, x1, y1 = self._cells(box)
        return self.worth[y0:y1, x0:x1]


def weigh(box: Sequence[float]) -> float:
    """Return the weight of a box's pixel, which is higher in a smaller box."""
    return 1 / (1 + abs((box[2] - box[0]) * (box[3] - box[1])))


def draw(image: np.ndarray, marks: Sequence[Mark], scale: float = 1, title: str = '') -> np.ndarray:
    """Draw objects on an image.

    Args:
        image: shape (H, W, 3), RGB, 0 to 255.
        marks: the objects; the last ones are on top.
        scale: the picture's size relative to the image's.
        title: a line above the picture.

    Returns:
        Picture, uint8, shape (scale * H, scale * W, 3), plus the height of the title if there is one.
    """
    image = np.clip(image, 0, 255).astype(np.uint8)  # a copy
    for mark in marks:
        if mark.mask is not None:
            (x, y), (height, width) = mark.corner, mark.mask.shape
            part = image[y : y + height, x : x + width]
            part[mark.mask] = 0.6 * part[mark.mask] + 0.4 * np.array(mark.colour)
            if not mark.framed:
                inner = cv2.erode(np.pad(mark.mask, 1).astype(np.uint8), np.ones((3, 3)))[1:-1, 1:-1]
                part[mark.mask & (inner == 0)] = mark.colour
    if scale != 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    height, width = image.shape[:2]
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    line = max(1, round(min(height, width) / 250))
    font = load_font(int(np.clip(min(height, width) / 32, 10, 28)))
    boxes = [[scale * float(edge) for edge in mark.box] for mark in marks]
    for mark, (x0, y0, x1, y1) in zip(marks, boxes):
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
        for start, end in zip(corners, corners[1:]) if mark.framed else ():
            for a, b in split_dashes(start, end, 5 * line) if mark.dashed else [(start, end)]:
                pen.line([a, b], mark.colour, line)
    placer = LabelPlacer(boxes, (width, height))
    for mark, box in zip(marks, boxes):
        if not mark.text:
            continue
        left, top, right, bottom = font.getbbox(mark.text)
        text = right - left + 4, bottom - top + 4
        x, y = placer.place(text, box)
        pen.rectangle([x, y, x + text[0] - 1, y + text[1] - 1], mark.colour)
        bright = np.dot(mark.colour, (0.299, 0.587, 0.114)) > 150
        pen.text((x + 2 - left, y + 2 - top), mark.text, 'black' if bright else 'white', font)
    return np.vstack([draw_title(title, width), np.asarray(picture)]) if title else np.asarray(picture)


def draw_title(text: str, width: int) -> np.ndarray:
    """Draw a line of text on white, as wide as a picture; longer text is truncated."""
    font = load_font(14)
    strip = Image.new('RGB', (width, 22), 'white')
    while text and font.getlength(text) > width - 8:
        text = text[:-2].rstrip('…') + '…' if len(text) > 2 else ''
    ImageDraw.Draw(strip).text((4, 2), text, '#1f2937', font)
    return np.asarray(strip)


def split_dashes(start: tuple[float, float], end: tuple[float, float], length: float) -> Iterator[tuple]:
    """Yield the start and end of each dash of a line."""
    start, end = np.array(start), np.array(end)
    count = max(1, round(np.linalg.norm(end - start) / length / 2))
    for i in range(count):
        first, last = start + (end - start) * i / count, start + (end - start) * (i + 0.5) / count
        yield tuple(first), tuple(last)


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that :func:`use_font_for` chose."""
    return ImageFont.truetype(findfont(FontProperties(family=matplotlib.rcParams['font.sans-serif'])), size)


def tile_pictures(pictures: Sequence[np.ndarray], columns: int = 4, gap: int = 8) -> np.ndarray:
    """Arrange pictures in rows, each padded with white to the size of the largest."""
    height, width = (max(picture.shape[axis] for picture in pictures) + gap for axis in (0, 1))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * height, gap + i % columns * width
        sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return sheet


def convert_to_marks(instances: InstanceData, classes: Sequence[str] | None, least: float = 0) -> list[Mark]:
    """Convert MMDetection's instances to marks, sorted by rising score.

    Args:
        instances: with bboxes and labels; scores and masks are optional.
        classes: names of the labels.
        least: the score threshold.
    """
    instances = instances.cpu()
    masks = instances.get('masks')
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    labels = np.asarray(instances.labels)
    scores = np.asarray(instances.scores) if 'scores' in instances else None
    marks = []
    for i in range(len(labels)) if scores is None else np.argsort(scores, kind='stable'):
        if scores is not None and scores[i] < least:
            continue
        name = classes[labels[i]] if classes is not None else f'class {labels[i]}'
        mask = None if masks is None else masks[int(i)]
        if isinstance(mask, BitmapMasks | PolygonMasks):
            (mask,) = mask.to_ndarray()
        text = format_label(name, None if scores is None else float(scores[i]))
        marks.append(Mark(np.asarray(boxes[i]), text, choose_colour(int(labels[i])), mask))
    return marks


def convert_map_to_marks(labels: np.ndarray, classes: Sequence[str]) -> list[Mark]:
    """Convert a map of labels, or MMDetection's map of label + instance * INSTANCE_OFFSET, to marks.

    Args:
        labels: int, shape (H, W); those that are not a class are void.
        classes: names of the labels.
    """
    marks = []
    for number in np.unique(labels).tolist():
        label = number % INSTANCE_OFFSET
        if 0 <= number and label < len(classes):
            marks.append(Mark(None, classes[label], choose_colour(label), labels == number, framed=False))
    return marks


@VISUALIZERS.register_module()
class LabelVisualizer(DetLocalVisualizer):
    """MMDetection's DetLocalVisualizer, with this package's style of boxes, masks and labels."""

    def _draw_instances(
        self, image: np.ndarray, instances: InstanceData, classes: list[str] | None, palette: object
    ) -> np.ndarray:
        return draw(image, convert_to_marks(instances, classes))

    def _draw_sem_seg(self, image: np.ndarray, sem_seg: PixelData, classes: list[str], palette: object) -> np.ndarray:
        return draw(image, convert_map_to_marks(np.asarray(sem_seg.get('sem_seg', sem_seg.get('data')))[0], classes))

    _draw_panoptic_seg = _draw_sem_seg


@HOOKS.register_module()
class PictureHook(DetVisualizationHook):
    """MMDetection's DetVisualizationHook that keeps images of the same name in different folders apart."""

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: list) -> None:
        """Draw predictions into the same subfolders as in the data set's image folder."""
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
