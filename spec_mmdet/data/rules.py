"""The rules of the data checks: what is wrong with a box or a mask, what is learnt from, and what is measured.

MMDetection learns from an object, and pycocotools measures detections by it, under conditions of their own:

============================================  ==================================  =====================================
an object                                     in training                         in COCO's AP
============================================  ==================================  =====================================
with iscrowd = 1                              is not learnt from: proposals on    is not counted, nor are the detections
                                              it are not taken for background     on it
with a box below a pixel in width or height,  is left out                         is counted
or with an area of 0
with ignore = 1                               is left out                         is counted: pycocotools reads iscrowd
of a class that the config does not take      is left out                         is not counted
in an image that filter_cfg leaves out        is left out: training only          is counted
============================================  ==================================  =====================================

(``CocoDataset.parse_data_info`` and ``filter_data``, ``PackDetInputs``, ``COCOeval._prepare``.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul

import numpy as np
from pycocotools import mask as mask_utils

TOLERANCE = 2.0  # pixels: tools round, and COCO's own boxes and polygons touch the border
MAX_PIXELS = 2**30  # of an image: what OpenCV decodes
LEFT_OUT = 'left out of training'

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1


def is_crowd(annotation: dict) -> bool:
    return bool(annotation.get('iscrowd'))


def why_not_learnt(annotation: dict) -> str:
    """The kind of those objects that training leaves out to which this one belongs, '' for one that is learnt from.

    Args:
        annotation: of a box and an area without fault, and of a class that is taken.
    """
    if is_crowd(annotation):
        return 'crowd regions, neither learnt from nor counted in AP'
    if min(annotation['bbox'][2:]) < 1:  # COCO has a few
        return f'boxes narrower or lower than a pixel, {LEFT_OUT}'
    if annotation['area'] <= 0:
        return f'objects whose "area" is 0, {LEFT_OUT}'
    if annotation.get('ignore'):
        return f'objects marked "ignore", {LEFT_OUT} but counted in AP'
    return ''


def is_measured(annotation: dict) -> bool:
    """Whether AP counts an object of a class that is taken."""
    return not is_crowd(annotation)


def why_image_not_learnt(image: dict, has_objects: bool, filter_cfg: Mapping) -> str:
    """The kind of those images that training leaves out to which this one belongs, '' for one that it takes.

    Args:
        image: its entry in the annotation file.
        has_objects: whether any object of the classes that are taken lies in it, crowds included.
        filter_cfg: the data set's.
    """
    if min(image['width'], image['height']) < filter_cfg.get('min_size', 0):
        return f'images with a side below {filter_cfg["min_size"]} pixels, {LEFT_OUT}'
    if filter_cfg.get('filter_empty_gt') and not has_objects:
        return f'images without an object, {LEFT_OUT}'
    return ''


def is_finite(numbers: object) -> bool:
    """Whether this is a list of finite numbers: JSON's parser takes NaN, Infinity and integers of any size, too."""
    try:
        return isinstance(numbers, list) and math.isfinite(sum(numbers)) and bool not in map(type, numbers)
    except (TypeError, OverflowError):  # what cannot be added, or not as a float
        return False


def outside(corners: Corners, width: float, height: float) -> bool:
    """Whether something reaches out of an image of this size by more than the tolerance."""
    x0, y0, x1, y1 = corners
    return min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE


def fault_of_size(width: int, height: int) -> str:
    """What is wrong with an image's size as the annotation file says it; '' where nothing is."""
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        return 'images whose width or height is not that of any image'
    return ''


def fault_of_box(box: object, width: float, height: float) -> str:
    """What is wrong with a box [x, y, width, height] in an image of this size, in pixels; '' where nothing is."""
    if not is_finite(box) or len(box) != 4:
        return 'boxes that are not four finite numbers [x, y, width, height]'
    x, y, w, h = box
    if w < 0 or h < 0:
        return 'boxes of negative width or height'
    return 'boxes that reach out of their image' if outside((x, y, x + w, y + h), width, height) else ''


def fault_of_area(area: object, box: Sequence[float]) -> str:
    """What is wrong with the area, in square pixels, of an object with this box; '' where nothing is."""
    if is_finite([area]) and (area > 0 or area == 0 and min(box[2:]) < 1):
        return ''
    return f'objects whose "area" is not above 0, {LEFT_OUT}'


def fault_of_crowd(iscrowd: object) -> str:
    """What is wrong with an object's "iscrowd"; '' where nothing is."""
    return '' if iscrowd in (0, 1) else 'objects whose "iscrowd" is neither 0 nor 1'


def fault_of_polygons(polygons: list, width: float, height: float) -> str:
    for polygon in polygons:
        if not is_finite(polygon):
            return 'polygons that are not lists [x, y, x, y, ...] of finite numbers'
        if len(polygon) < 6 or len(polygon) % 2:
            return 'polygons of fewer than 6 coordinates or an odd number of them'
    return 'polygons that reach out of their image' if outside(extent_of_polygons(polygons), width, height) else ''


def runs_of_rle(counts: list | str) -> np.ndarray | None:
    """The lengths of the runs of an RLE mask, or None where they are not whole numbers from 0 on.

    pycocotools does not look: a string that breaks off is read past its end, and runs that do not sum up can make an
    evaluation go on for ever. COCO's strings hold numbers in groups of 5 bits, the lowest first and bit 6 where more
    follow, from the fourth on as differences to the number before the last.
    """
    if isinstance(counts, list):
        whole = is_finite(counts) and all(v >= 0 and v == int(v) for v in counts)
        return np.array(counts, np.int64) if whole and sum(counts) < 2**62 else None
    try:
        groups = np.frombuffer(counts.encode('ascii'), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not groups.size or groups.min() < 0 or groups.max() > 63 or groups[-1] & 32:
        return None
    ends = np.flatnonzero(~groups & 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 6:  # 30 bits are more pixels than an image has
        return None
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((groups & 31) << 5 * place, starts)
    numbers -= np.where(groups[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers if numbers.min() >= 0 else None


def fault_of_rle(mask: dict, width: int, height: int) -> str:
    size = mask.get('size')
    if size != [height, width] or set(map(type, size)) != {int}:
        return 'RLE masks whose size [height, width] is not that of their image'
    runs = runs_of_rle(mask['counts'])
    if runs is None or runs.sum() != width * height or not runs[1::2].any():
        return 'RLE masks that are empty or whose runs do not make up their image'
    return ''


def fault_of_mask(mask: object, width: int, height: int) -> str:
    """What is wrong with a segmentation in an image of this size, in pixels; '' where nothing is.

    Whatever passes can be given to pycocotools, which eats all memory, goes on for ever or dies of what does not.
    """
    if isinstance(mask, list) and mask:
        return fault_of_polygons(mask, width, height)
    if isinstance(mask, dict) and isinstance(mask.get('counts'), list | str):
        return fault_of_rle(mask, width, height)
    return 'masks that are neither polygons nor RLE'


def can_be_measured(mask: object, width: int, height: int) -> bool:
    """Whether pycocotools ends with a segmentation, in little memory: be it empty, or cut at the image's edge."""
    if fault_of_size(width, height):
        return False
    if isinstance(mask, list):
        fault = fault_of_mask(mask, width, height)
        reaches_out = fault.startswith('polygons that reach out')
        return not fault or reaches_out and max(map(abs, extent_of_polygons(mask))) <= 10 * max(width, height)
    counts = mask.get('counts') if isinstance(mask, dict) else None
    runs = runs_of_rle(counts) if isinstance(counts, list | str) else None
    return runs is not None and mask.get('size') == [height, width] and runs.sum() == width * height


def extent_of_polygons(polygons: list[list[float]]) -> Corners:
    xs, ys = ([v for polygon in polygons for v in polygon[first::2]] for first in (0, 1))
    return min(xs), min(ys), max(xs), max(ys)


def area_of_polygon(polygon: list[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))) / 2


def rasterised(mask: list | dict, width: int, height: int) -> dict:
    """pycocotools' compressed RLE of a mask without fault."""
    if isinstance(mask, list):
        return mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    return mask_utils.frPyObjects(mask, height, width) if isinstance(mask['counts'], list) else mask


def overlap(a: Corners, b: Corners) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area_of(corners: Corners) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def agreement(a: Corners, b: Corners) -> float:
    """Intersection over union."""
    shared = overlap(a, b)
    return shared / max(area_of(a) + area_of(b) - shared, 1e-9)


def compare_mask_and_box(mask: list | dict, box: Sequence[float], width: int, height: int) -> tuple[str, str]:
    """What is wrong, and what may be, with a mask and a box that are without fault, but are of one object.

    In COCO the two agree to an intersection over union of 0.94 and more. Less than half of that is warned of, as boxes
    may mean the whole of what is partly hidden. What is refused cannot be meant so.
    """
    if isinstance(mask, list):
        extent = extent_of_polygons(mask)
        empty = sum(map(area_of_polygon, mask)) < 4 and not mask_utils.area(rasterised(mask, width, height))
    else:
        x0, y0, w0, h0 = mask_utils.toBbox(rasterised(mask, width, height)).tolist()
        extent, empty = (x0, y0, x0 + w0, y0 + h0), False
    x, y, w, h = box
    if empty:
        nothing = 'masks that cover no pixel'
        return ('', nothing) if w * h < 16 else (nothing, '')
    whole, corners = (x, y, x + w, y + h), (x, y, w, h)
    grown = (x - TOLERANCE, y - TOLERANCE, x + w + TOLERANCE, y + h + TOLERANCE)
    if w > x and h > y and agreement(extent, corners) > 0.9 > agreement(extent, whole):
        return 'boxes that are corners [x0, y0, x1, y1], not [x, y, width, height]', ''
    if overlap(extent, grown) < 0.5 * area_of(extent):
        return 'masks that lie outside of their boxes', ''
    doubt = min(w, h) > 4 * TOLERANCE and agreement(extent, whole) < 0.5
    return '', 'masks that fill less than half of their boxes' * doubt
