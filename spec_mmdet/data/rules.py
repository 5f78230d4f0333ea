"""Define valid boxes and masks, and which objects training and evaluation use.

MMDetection uses an object for training, and pycocotools for evaluation, under different conditions:

============================================  ==================================  =====================================
an object                                     in training                         in COCO's AP
============================================  ==================================  =====================================
with iscrowd = 1                              is ignored: proposals on it are     is ignored, as are detections on it
                                              not background
with a box below a pixel in width or height,  is left out                         is counted
or with an area of 0
with ignore = 1                               is left out                         is counted: pycocotools reads iscrowd
of a class that the config does not use       is left out                         is left out
in an image that filter_cfg leaves out        is left out                         is counted
============================================  ==================================  =====================================

(``CocoDataset.parse_data_info`` and ``filter_data``, ``PackDetInputs``, ``COCOeval._prepare``.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import mul

import numpy as np
from pycocotools import mask as mask_utils

TOLERANCE = 2.0  # pixels: tools round, and COCO's own boxes and polygons touch the border
MAX_PIXELS = 2**30  # OpenCV's limit for an image
LEFT_OUT = 'left out of training'

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1


def is_crowd(annotation: dict) -> bool:
    return bool(annotation.get('iscrowd'))


def explain_exclusion(annotation: dict) -> str:
    """Return why training leaves out an object, as a kind of findings; '' if it is used.

    Args:
        annotation: an object of a used class, with a valid box and area.
    """
    if is_crowd(annotation):
        return 'crowd regions, ignored in training and in AP'
    if min(annotation['bbox'][2:]) < 1:  # COCO has a few
        return f'boxes narrower or lower than a pixel, {LEFT_OUT}'
    if annotation['area'] <= 0:
        return f'objects whose "area" is 0, {LEFT_OUT}'
    if annotation.get('ignore'):
        return f'objects marked "ignore", {LEFT_OUT} but counted in AP'
    return ''


def is_measured(annotation: dict) -> bool:
    """Return whether AP counts an object of a used class."""
    return not is_crowd(annotation)


def explain_image_exclusion(image: dict, has_objects: bool, filter_cfg: Mapping) -> str:
    """Return why training leaves out an image, as a kind of findings; '' if it is used.

    Args:
        image: its entry in the annotation file.
        has_objects: whether it contains objects of used classes, crowds included.
        filter_cfg: the data set's setting.
    """
    if min(image['width'], image['height']) < filter_cfg.get('min_size', 0):
        return f'images with a side below {filter_cfg["min_size"]} pixels, {LEFT_OUT}'
    if filter_cfg.get('filter_empty_gt') and not has_objects:
        return f'images without an object, {LEFT_OUT}'
    return ''


def is_finite(numbers: object) -> bool:
    """Return whether a value is a list of finite numbers (JSON may contain NaN and integers of any size)."""
    try:
        return isinstance(numbers, list) and math.isfinite(sum(numbers)) and bool not in map(type, numbers)
    except (TypeError, OverflowError):  # not numbers, or too large for a float
        return False


def reaches_outside(corners: Corners, width: float, height: float) -> bool:
    """Return whether a box extends beyond an image of this size by more than the tolerance."""
    x0, y0, x1, y1 = corners
    return min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE


def find_size_fault(width: int, height: int) -> str:
    """Name the fault of an image's size in the annotation file; '' for a valid size."""
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        return 'images with an invalid width or height (below 1, or more than 2^30 pixels in total)'
    return ''


def find_box_fault(box: object, width: float, height: float) -> str:
    """Name the fault of a box [x, y, width, height] in an image of this size, in pixels; '' for a valid box."""
    if not is_finite(box) or len(box) != 4:
        return 'boxes that are not four finite numbers [x, y, width, height]'
    x, y, w, h = box
    if w < 0 or h < 0:
        return 'boxes of negative width or height'
    return 'boxes that extend beyond their image' if reaches_outside((x, y, x + w, y + h), width, height) else ''


def find_area_fault(area: object, box: Sequence[float]) -> str:
    """Name the fault of the area, in square pixels, of an object with this box; '' for a valid area."""
    if is_finite([area]) and (area > 0 or area == 0 and min(box[2:]) < 1):
        return ''
    return f'objects whose "area" is not above 0, {LEFT_OUT}'


def find_crowd_fault(iscrowd: object) -> str:
    """Name the fault of an object's "iscrowd"; '' for 0 and 1."""
    return '' if iscrowd in (0, 1) else 'objects whose "iscrowd" is neither 0 nor 1'


def find_polygon_fault(polygons: list, width: float, height: float) -> str:
    for polygon in polygons:
        if not is_finite(polygon):
            return 'polygons that are not lists [x, y, x, y, ...] of finite numbers'
        if len(polygon) < 6 or len(polygon) % 2:
            return 'polygons of fewer than 6 coordinates or an odd number of them'
    return 'polygons that extend beyond their image' if reaches_outside(compute_extent(polygons), width, height) else ''


def decode_runs(counts: list | str) -> np.ndarray | None:
    """Return the lengths of the runs of an RLE mask, or None if they are not integers of at least 0.

    pycocotools does not check them: it reads past the end of a truncated string, and a wrong sum of runs can make an
    evaluation endless. COCO's strings contain numbers in groups of 5 bits, the lowest first; bit 6 marks that another
    group follows. From the fourth number on, they are differences from the number before the previous one.
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
    if lengths.max() > 6:  # 30 bits are enough for any image
        return None
    place = np.arange(groups.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((groups & 31) << 5 * place, starts)
    numbers -= np.where(groups[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers if numbers.min() >= 0 else None


def find_rle_fault(mask: dict, width: int, height: int) -> str:
    size = mask.get('size')
    if size != [height, width] or set(map(type, size)) != {int}:
        return 'RLE masks whose size [height, width] differs from their image'
    runs = decode_runs(mask['counts'])
    if runs is None or runs.sum() != width * height or not runs[1::2].any():
        return 'RLE masks that are empty or whose runs do not sum up to the size of their image'
    return ''


def find_mask_fault(mask: object, width: int, height: int) -> str:
    """Name the fault of a segmentation in an image of this size, in pixels; '' for a valid one.

    A faulty one can make pycocotools exhaust memory, run forever, or crash.
    """
    if isinstance(mask, list) and mask:
        return find_polygon_fault(mask, width, height)
    if isinstance(mask, dict) and isinstance(mask.get('counts'), list | str):
        return find_rle_fault(mask, width, height)
    return 'masks that are neither polygons nor RLE'


def can_be_measured(mask: object, width: int, height: int) -> bool:
    """Return whether pycocotools can evaluate a segmentation, which may be empty, in little time and memory."""
    if find_size_fault(width, height):
        return False
    if isinstance(mask, list):
        fault = find_mask_fault(mask, width, height)
        reaches_out = fault.startswith('polygons that extend beyond')
        return not fault or reaches_out and max(map(abs, compute_extent(mask))) <= 10 * max(width, height)
    counts = mask.get('counts') if isinstance(mask, dict) else None
    runs = decode_runs(counts) if isinstance(counts, list | str) else None
    return runs is not None and mask.get('size') == [height, width] and runs.sum() == width * height


def compute_extent(polygons: list[list[float]]) -> Corners:
    numbers = list(chain.from_iterable(polygons))
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def compute_polygon_area(polygon: list[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))) / 2


def rasterise(mask: list | dict, width: int, height: int) -> dict:
    """Return pycocotools' compressed RLE of a valid mask."""
    if isinstance(mask, list):
        return mask_utils.merge(mask_utils.frPyObjects(mask, height, width))
    return mask_utils.frPyObjects(mask, height, width) if isinstance(mask['counts'], list) else mask


def compute_overlap(a: Corners, b: Corners) -> float:
    """Compute the area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def compute_area(corners: Corners) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def compute_iou(a: Corners, b: Corners) -> float:
    """Compute the intersection over union of two boxes."""
    shared = compute_overlap(a, b)
    return shared / max(compute_area(a) + compute_area(b) - shared, 1e-9)


def compare_mask_and_box(mask: list | dict, box: Sequence[float], width: int, height: int) -> tuple[str, str]:
    """Return the error and the warning (or '') about a valid mask and a valid box of the same object.

    In COCO their IoU is at least 0.94. An IoU below 0.5 is only a warning, because boxes may include the hidden part of
    an object.
    """
    if isinstance(mask, list):
        extent = compute_extent(mask)
        empty = sum(map(compute_polygon_area, mask)) < 4 and not mask_utils.area(rasterise(mask, width, height))
    else:
        x0, y0, w0, h0 = mask_utils.toBbox(rasterise(mask, width, height)).tolist()
        extent, empty = (x0, y0, x0 + w0, y0 + h0), False
    x, y, w, h = box
    if empty:
        nothing = 'masks that cover no pixel'
        return ('', nothing) if w * h < 16 else (nothing, '')
    iou = compute_iou(extent, (x, y, x + w, y + h))
    if iou >= 0.9:
        return '', ''
    if w > x and h > y and compute_iou(extent, (x, y, w, h)) > 0.9:
        return 'boxes that are corners [x0, y0, x1, y1], not [x, y, width, height]', ''
    grown = (x - TOLERANCE, y - TOLERANCE, x + w + TOLERANCE, y + h + TOLERANCE)
    if compute_overlap(extent, grown) < 0.5 * compute_area(extent):
        return 'masks that lie outside of their boxes', ''
    doubt = min(w, h) > 4 * TOLERANCE and iou < 0.5
    return '', 'masks that fill less than half of their boxes' * doubt


def find_sound_objects(annotations: Sequence[dict], sizes: Mapping[object, tuple[int, int]]) -> set[int]:
    """Return the positions of objects with a single polygon that break no rule of this module.

    NumPy tests all objects together, which is several times faster. An object that is not returned may be sound, too.

    Args:
        annotations: entries of an annotation file.
        sizes: width and height of each valid image by its id.
    """
    places, rows, polygons = [], [], []
    for place, annotation in enumerate(annotations):
        mask, size, box = annotation.get('segmentation'), sizes.get(annotation['image_id']), annotation['bbox']
        if size is None or len(box) != 4 or annotation['iscrowd'] != 0 or annotation.get('ignore'):
            continue
        if not isinstance(mask, list) or len(mask) != 1 or not isinstance(mask[0], list):
            continue
        if len(mask[0]) >= 6 and len(mask[0]) % 2 == 0:
            places.append(place)
            rows.append([*box, annotation['area'], *size])
            polygons.append(mask[0])
    if not places or set(map(type, chain(*rows, *polygons))) - {int, float}:
        return set()
    try:
        x, y, w, h, area, width, height = np.array(rows, float).T
        points = np.fromiter(chain.from_iterable(polygons), float).reshape(-1, 2)
    except OverflowError:
        return set()
    ends = np.cumsum([len(polygon) // 2 for polygon in polygons])
    starts = np.r_[0, ends[:-1]]
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    with np.errstate(all='ignore'):
        (x0, y0), (x1, y1) = (bound.reduceat(points, starts).T for bound in (np.minimum, np.maximum))
        cross = points[:, 0] * points[following, 1] - points[:, 1] * points[following, 0]
        shared = np.maximum(0, np.minimum(x1, x + w) - np.maximum(x0, x))
        shared *= np.maximum(0, np.minimum(y1, y + h) - np.maximum(y0, y))
        union = (x1 - x0) * (y1 - y0) + w * h - shared
        sound = (abs(np.add.reduceat(cross, starts)) >= 8) & (area > 0) & (w >= 1) & (h >= 1) & (shared >= 0.9 * union)
        sound &= (np.minimum(x, x0) >= -TOLERANCE) & (np.maximum(x + w, x1) <= width + TOLERANCE)
        sound &= (np.minimum(y, y0) >= -TOLERANCE) & (np.maximum(y + h, y1) <= height + TOLERANCE)
    return {places[i] for i in np.flatnonzero(sound)}


def decode_ids(image: np.ndarray) -> np.ndarray:
    """Return the segment ids of a PNG, int32, shape (H, W), from its pixels, RGB, shape (H, W, 3)."""
    return np.asarray(image, np.int32) @ np.array([1, 256, 256**2], np.int32)


def encode_ids(ids: np.ndarray) -> np.ndarray:
    """Return the pixels of a PNG, RGB, uint8, shape (H, W, 3), for segment ids, shape (H, W)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
