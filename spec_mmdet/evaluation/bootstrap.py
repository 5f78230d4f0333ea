"""Compute COCO AP of resampled images from one matching of detections with annotations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params
from scipy.sparse import csr_array

from .metrics import require_measurable

BLOCK = 2**18  # entries of the arrays of a block of draws, which fit into the processor's cache
MAX_DETECTIONS = 100  # per image and class, as in COCO's AP


class ResampledAP:
    """AP of a detector on weighted images, for many draws of weights at once.

    As in pycocotools, AP is the mean over IoU thresholds from 0.50 to 0.95 and 101 recalls, for objects of all sizes
    and at most 100 detections per image and class.

    Args:
        truth: the annotations.
        results: detections in COCO's results format, with the ids of ``truth``; not empty.
        kind: 'bbox' or 'segm'.
        categories: ids of the categories to evaluate; by default all of them.

    Raises:
        InputError: if the box or mask of an annotation is invalid.
    """

    def __init__(
        self, truth: COCO, results: Sequence[dict], kind: str, categories: Sequence[int] | None = None
    ) -> None:
        require_measurable(truth, kind)
        self.images = sorted(image['id'] for image in truth.dataset['images'])  # equal scores rank in this order
        place = {image: i for i, image in enumerate(self.images)}
        annotations, found = defaultdict(list), defaultdict(list)
        for annotation in truth.dataset['annotations']:
            if annotation['image_id'] in place:
                annotations[annotation['category_id']].append(annotation)
        for result in results:
            found[result['category_id']].append(result)
        if categories is None:
            categories = [category['id'] for category in truth.dataset['categories']]
        categories = [category for category in categories if not all(map(is_ignored, annotations[category]))]
        self.classes = [ClassMatches(truth, annotations[c], found[c], kind, place) for c in categories]
        counted = [[place[a['image_id']] for a in annotations[c] if not is_ignored(a)] for c in categories]
        rows = np.repeat(np.arange(len(counted)), list(map(len, counted)))
        self.objects = count_matrix(rows, np.concatenate([*counted, []]), len(counted), len(place))

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """Compute AP of each draw, shape (draws,): the mean over the classes with objects, NaN if there are none.

        Args:
            weights: how often each of :attr:`images` counts, integers, shape (draws, images).
        """
        weights = np.ascontiguousarray(np.asarray(weights, np.int32).T)
        objects = self.objects @ weights
        total = np.zeros(weights.shape[1])
        for matches, number in zip(self.classes, objects):
            block = max(1, BLOCK // max(1, matches.counted.shape[0], number.max(initial=0)))
            for start in range(0, len(total), block):
                part = slice(start, start + block)
                total[part] += matches.measure(weights[:, part], number[part])
        with np.errstate(invalid='ignore'):
            return total / (objects > 0).sum(axis=0)


class ClassMatches:
    """The detections of one class, matched with its objects.

    Precision has its maxima at true positives, so only these become rows, by falling score. A row contains the true
    positive and the detections since the previous one.

    Attributes:
        counted: number of detections of each image in a row, shape (rows, images).
        levels: for each IoU threshold the rows that are true positives, their images, and the number of each image's
            ignored detections (on crowds), shape (these rows, images), or None if no detection is ignored.
    """

    thresholds = np.minimum(Params('bbox').iouThrs, 1 - 1e-10)
    recalls = Params('bbox').recThrs

    def __init__(self, truth: COCO, annotations: list[dict], results: list[dict], kind: str, place: dict) -> None:
        images = np.array([place[result['image_id']] for result in results], int)
        scores = np.array([result['score'] for result in results], float)
        order = np.lexsort((-scores, images))
        images = images[order]
        rank = np.arange(len(order)) - np.searchsorted(images, images)
        order, images = order[rank < MAX_DETECTIONS], images[rank < MAX_DETECTIONS]
        hit, ignored = np.zeros((2, len(self.thresholds), len(order)), bool)
        by_image = defaultdict(list)
        for annotation in annotations:
            by_image[place[annotation['image_id']]].append(annotation)
        for image, objects in by_image.items():
            start, end = np.searchsorted(images, [image, image + 1])
            if start < end:
                ious = compute_ious(truth, [results[i] for i in order[start:end]], objects, kind)
                for detection, level, ignore in match(ious, objects, self.thresholds):
                    (ignored if ignore else hit)[level, start + detection] = True
        by_score = np.argsort(-scores[order], kind='stable')
        images, hit, ignored = images[by_score], hit[:, by_score], ignored[:, by_score]
        true = np.flatnonzero(hit.any(axis=0))
        rows = np.searchsorted(true, np.arange(len(images)))
        kept = rows < len(true)
        self.counted = count_matrix(rows[kept], images[kept], len(true), len(place))
        self.levels = []
        for hits, ignores in zip(hit, ignored):
            found, left_out = np.flatnonzero(hits), np.flatnonzero(ignores)
            left_out = left_out[left_out < found[-1]] if len(found) else left_out[:0]
            crowds = count_matrix(np.searchsorted(found, left_out), images[left_out], len(found), len(place))
            self.levels.append((rows[found], images[found], crowds if len(left_out) else None))

    def measure(self, weights: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """Compute the class's AP of each draw, 0 without objects.

        Args:
            weights: shape (images, draws).
            objects: weighted number of objects, shape (draws,).
        """
        total = np.zeros(len(objects))
        # For each draw and number of true positives, the number of recalls reached.
        most = int(objects.max())
        recall = np.arange(most + 1) / np.maximum(objects, 1)[:, None]
        reached_by = np.searchsorted(self.recalls, recall, side='right')
        start = np.arange(len(objects)) * (most + 1)
        counted = np.cumsum(self.counted @ weights, axis=0, dtype=np.int32)
        for rows, images, crowds in self.levels:
            if not len(rows):
                continue
            true = np.cumsum(weights[images], axis=0, dtype=np.int32)
            every = counted[rows]
            if crowds is not None:
                every -= np.cumsum(crowds @ weights, axis=0, dtype=np.int32)
            precision = true / np.maximum(every, 1)
            precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
            reached = np.take(reached_by, true + start)
            total += np.einsum('ij,ij->j', precision, np.diff(reached, axis=0, prepend=0))
        return total / (len(self.thresholds) * len(self.recalls))


def is_ignored(annotation: dict) -> bool:
    """Return whether pycocotools ignores an object and the detections on it."""
    return bool(annotation.get('iscrowd')) or not 0 <= annotation['area'] <= 1e10


def count_matrix(rows: np.ndarray, columns: np.ndarray, *shape: int) -> csr_array:
    """Count pairs of a row and a column in a sparse matrix of ``shape``."""
    return csr_array((np.ones(len(rows), np.int32), (rows, np.asarray(columns, int))), shape)


def compute_ious(truth: COCO, results: list[dict], objects: list[dict], kind: str) -> np.ndarray:
    """Compute the IoU of an image's detections and objects, shape (detections, objects)."""
    crowds = [int(bool(annotation.get('iscrowd'))) for annotation in objects]
    if kind == 'bbox':
        boxes = (np.array([entry['bbox'] for entry in entries], float) for entries in (results, objects))
        return mask_utils.iou(*boxes, crowds)
    masks = [truth.annToRLE(annotation) for annotation in objects]
    return mask_utils.iou([result['segmentation'] for result in results], masks, crowds)


def match(ious: np.ndarray, objects: list[dict], thresholds: np.ndarray) -> list[tuple[int, int, bool]]:
    """Match an image's detections, by falling score, with its objects.

    At each threshold a detection is matched with the free object of the highest IoU, or else with an ignored one. A
    crowd can be matched with any number of detections.

    Returns:
        Triples: detection, index of the threshold, whether the object is ignored.
    """
    ignored = [is_ignored(annotation) for annotation in objects]
    taken: set[tuple[int, int]] = set()
    matches = []
    for detection in np.flatnonzero((ious >= thresholds[0]).any(axis=1)):
        overlaps = ious[detection].tolist()
        near = [i for i in range(len(objects)) if overlaps[i] >= thresholds[0]]
        near.sort(key=lambda i: (ignored[i], -overlaps[i], -i))
        for level, threshold in enumerate(thresholds):
            for i in near:
                if overlaps[i] >= threshold and (level, i) not in taken:
                    if not objects[i].get('iscrowd'):
                        taken.add((level, i))
                    matches.append((detection, level, ignored[i]))
                    break
    return matches


def draw_weights(images: int, draws: int, seed: int = 0) -> np.ndarray:
    """Draw as many images as there are, with replacement; return how often each is drawn, shape (draws, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)
