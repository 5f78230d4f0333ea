"""Classify objects and detections: true positives, false negatives, and TIDE's types of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from ..data.reading import AnnotationFile
from .metrics import Evaluation, read_detections

MIN_IOU = 0.5
BACKGROUND_IOU = 0.1
# TIDE's types of errors (arXiv 2008.08115), with its names and a description.
ERRORS = {
    'localisation': ('Loc', 'correct class, but IoU 0.1 to 0.5'),
    'class': ('Cls', 'wrong class, IoU at least 0.5'),
    'both': ('Both', 'wrong class and IoU 0.1 to 0.5'),
    'duplicate': ('Dupe', 'correct class and IoU, but a detection with a higher score matches the object'),
    'background': ('Bkg', 'no object with IoU above 0.1'),
    'missed': ('Miss', 'object without a matching detection or one with a localisation or class error'),
}


@dataclass
class Outcome:
    """Ids of an image's true and false positives above a score threshold, and of its false negatives."""

    true_positives: list[tuple[int, int]] = field(default_factory=list)  # detection and object
    false_positives: list[int] = field(default_factory=list)  # detections
    crowd: list[int] = field(default_factory=list)  # ignored detections on crowd regions
    false_negatives: list[int] = field(default_factory=list)  # objects
    confused: list[tuple[int, int]] = field(default_factory=list)  # class errors: detection and object
    errors: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in ERRORS})


def match_detections(annotations: AnnotationFile, detections: Path, summary: COCOeval) -> COCOeval:
    """Match detections with objects as pycocotools does, only at :data:`MIN_IOU` and for all sizes together.

    ``summary`` is an evaluation of the same detections; it defines their kind, the classes and the limit of detections.
    """
    kind = summary.params.iouType
    with redirect_stdout(None):
        evaluation = Evaluation(annotations, annotations.loadRes(read_detections(detections, kind)), kind)
        params = evaluation.params
        params.iouThrs, params.areaRng, params.areaRngLbl = np.array([MIN_IOU]), params.areaRng[:1], ['all']
        params.catIds, params.maxDets = list(summary.params.catIds), summary.params.maxDets[-1:]
        evaluation.evaluate()
    return evaluation


def iterate_matches(evaluation: COCOeval) -> Iterator[dict]:
    """Yield pycocotools' matching at MIN_IOU, an entry per image and category.

    Matching is greedy by falling score, so detections below a threshold do not affect those above.
    """
    whole = evaluation.params.areaRng[0]
    (threshold,) = np.flatnonzero(evaluation.params.iouThrs == MIN_IOU)
    for entry in evaluation.evalImgs:
        if entry is not None and entry['aRng'] == whole:
            yield dict(
                image=entry['image_id'],
                ids=entry['dtIds'],
                scores=np.asarray(entry['dtScores']),
                matched=np.asarray(entry['dtMatches'][threshold]).astype(int),
                ignored=np.asarray(entry['dtIgnore'][threshold], bool),
                objects=[t for t, ignored in zip(entry['gtIds'], entry['gtIgnore']) if not ignored],
            )


@dataclass
class Scores:
    """Precision, recall and F1 of detections at or above each threshold, for all classes together; shape (101,).

    Precision is NaN where no detection remains, and recall without objects.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int:
        """The index of the best F1; the middle one of equal ones."""
        places = np.flatnonzero(self.f1 == self.f1.max())
        return int(places[len(places) // 2])


def measure_scores(evaluation: COCOeval) -> Scores:
    """Compute precision, recall and F1 against the score threshold, at MIN_IOU."""
    entries = list(iterate_matches(evaluation))
    objects = sum(len(entry['objects']) for entry in entries)
    counted = [(entry['scores'][~entry['ignored']], entry['matched'][~entry['ignored']] > 0) for entry in entries]
    scores = np.concatenate([np.empty(0), *(score for score, _ in counted)])
    hits = np.sort(np.concatenate([np.empty(0), *(score[hit] for score, hit in counted)]))
    thresholds = np.arange(101) / 100
    found, detections = (len(s) - np.searchsorted(s, thresholds) for s in (hits, np.sort(scores)))
    f1 = 2 * found / (detections + objects).clip(1)
    with np.errstate(invalid='ignore'):
        return Scores(thresholds, found / detections, found / np.float64(objects), f1)


def find_outcomes(evaluation: COCOeval, threshold: float) -> dict[int, Outcome]:
    """Return the outcomes at a score threshold, by image id."""
    result = {image_id: Outcome() for image_id in evaluation.params.imgIds}
    for entry in iterate_matches(evaluation):
        outcome = result[entry['image']]
        sure = [i for i, score in enumerate(entry['scores']) if score >= threshold]
        for i in sure:
            if entry['ignored'][i]:
                outcome.crowd.append(entry['ids'][i])
            elif entry['matched'][i]:
                outcome.true_positives.append((entry['ids'][i], int(entry['matched'][i])))
            else:
                outcome.false_positives.append(entry['ids'][i])
        found = {int(entry['matched'][i]) for i in sure}
        outcome.false_negatives += [truth for truth in entry['objects'] if truth not in found]
    for outcome in result.values():
        classify_errors(evaluation, outcome)
    return result


def classify_errors(evaluation: COCOeval, outcome: Outcome) -> None:
    """Classify an image's errors, in TIDE's order; changes ``outcome``.

    We do not use the authors' package tidecv: it has had no release since 2020, needs pandas and seaborn, and counts
    detections on crowd regions as errors. Without crowds, its counts are the same (tests/evaluation).
    """
    truth, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    shape = 'segmentation' if evaluation.params.iouType == 'segm' else 'bbox'
    objects = [*(o for _, o in outcome.true_positives), *outcome.false_negatives]
    classes = np.array([truth[o]['category_id'] for o in objects])
    used = np.arange(len(objects)) < len(outcome.true_positives)
    ious = np.zeros((len(outcome.false_positives), len(objects)))
    if ious.size:
        shapes = [found[d][shape] for d in outcome.false_positives], [truth[o][shape] for o in objects]
        ious = mask_utils.iou(*shapes, [0] * len(objects))
    reached = set()  # objects with a localisation or class error
    for detection, iou in zip(outcome.false_positives, ious):
        same = np.where(classes == found[detection]['category_id'], iou, 0)
        other = iou - same
        if BACKGROUND_IOU <= same.max(initial=0) < MIN_IOU:
            kind = 'localisation'
            reached.add(objects[same.argmax()])
        elif other.max(initial=0) >= MIN_IOU:
            kind = 'class'
            reached.add(objects[other.argmax()])
            outcome.confused.append((detection, objects[other.argmax()]))
        elif (same * used).max(initial=0) >= MIN_IOU:
            kind = 'duplicate'
        else:
            kind = 'background' if iou.max(initial=0) <= BACKGROUND_IOU else 'both'
        outcome.errors[kind].append(detection)
    outcome.errors['missed'] = [o for o in outcome.false_negatives if o not in reached]


def count_confusions(evaluation: COCOeval, outcome_of: dict[int, Outcome]) -> np.ndarray:
    """Compute the confusion matrix of the categories and, last, the background.

    True positives count on the diagonal, and class errors in the row of their object's class. All other false positives
    count in the background's row, and all other false negatives in its column, so that the counts of two classes are
    the class errors.

    Returns:
        Counts; rows are truth, columns are predictions and sum up to the detections. An object with several class
        errors counts in its row as often.
    """
    place = {category: i for i, category in enumerate(evaluation.params.catIds)}
    truth, found = evaluation.cocoGt.anns, evaluation.cocoDt.anns
    matrix = np.zeros((len(place) + 1, len(place) + 1), int)

    def find_row(object_id: int) -> int:
        return place[truth[object_id]['category_id']]

    def find_column(detection: int) -> int:
        return place[found[detection]['category_id']]

    for outcome in outcome_of.values():
        confused, objects = ({pair[i] for pair in outcome.confused} for i in (0, 1))
        for detection, object_id in (*outcome.true_positives, *outcome.confused):
            matrix[find_row(object_id), find_column(detection)] += 1
        for detection in outcome.false_positives:
            if detection not in confused:
                matrix[-1, find_column(detection)] += 1
        for object_id in outcome.false_negatives:
            if object_id not in objects:
                matrix[find_row(object_id), -1] += 1
    return matrix
