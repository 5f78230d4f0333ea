"""COCO AP of images drawn anew, from one matching of results with the truth: how far chance in the images reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO

from .metrics import Evaluation


class ResampledAP:
    """AP of one detector's results under any weighting of the images.

    Args:
        truth: the annotations.
        results: in COCO's results format; not empty.
        kind: 'bbox' or 'segm'.
    """

    def __init__(self, truth: COCO, results: Sequence[dict], kind: str) -> None:
        evaluation = Evaluation(truth, truth.loadRes(list(results)), kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ['all']
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        self.images = list(evaluation.params.imgIds)
        self.recalls = evaluation.params.recThrs
        place = {image: i for i, image in enumerate(self.images)}
        self.classes: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        by_class: dict[int, list[dict]] = {}
        for entry in filter(None, evaluation.evalImgs):
            by_class.setdefault(entry['category_id'], []).append(entry)
        for entries in by_class.values():
            # As pycocotools does it: a stable sort of all images' detections by falling score.
            order = np.argsort(-np.concatenate([entry['dtScores'] for entry in entries]), kind='mergesort')
            counted = ~np.concatenate([entry['dtIgnore'] for entry in entries], axis=1)[:, order].astype(bool)
            hit = np.concatenate([entry['dtMatches'] for entry in entries], axis=1)[:, order] != 0
            where = np.repeat([place[entry['image_id']] for entry in entries], [len(e['dtIds']) for e in entries])
            objects = np.zeros(len(self.images))
            for entry in entries:
                objects[place[entry['image_id']]] += (np.asarray(entry['gtIgnore']) == 0).sum()
            if objects.any():
                self.classes.append((where[order].astype(int), counted & hit, counted & ~hit, objects))

    def __call__(self, weights: np.ndarray) -> float:
        """AP when each image counts as often as ``weights``, shape (images,), has it; of classes that are there."""
        precisions = [self._class(weights, *parts) for parts in self.classes if weights @ parts[3] > 0]
        return float(np.mean(precisions)) if precisions else float('nan')

    def _class(
        self, weights: np.ndarray, where: np.ndarray, hit: np.ndarray, miss: np.ndarray, objects: np.ndarray
    ) -> float:
        """The mean precision over thresholds of IoU and recall, as pycocotools interpolates it."""
        each = weights[where]
        true, false = (each * hit).cumsum(axis=1), (each * miss).cumsum(axis=1)
        recall = true / (weights @ objects)
        precision = true / np.maximum(true + false, np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        total = 0.0
        for row, reached in zip(precision, recall):
            at = np.searchsorted(reached, self.recalls, side='left')
            total += row[at[at < len(row)]].sum()
        return total / (len(precision) * len(self.recalls))


def draw_weights(images: int, draws: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn, shape (draws, images): as many as there are, with replacement."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=draws)
