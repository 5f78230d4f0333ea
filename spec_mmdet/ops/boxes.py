"""Non-maximum suppression, hard and soft, and what it suppresses."""

from __future__ import annotations

import numpy as np
import torch
import torchvision.ops
from torch import Tensor

from .precision import widen


def _single(threshold: float) -> float:
    """Round a threshold to single precision, as mmcv does in its comparisons."""
    return float(np.float32(threshold))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept by non-maximum suppression, by falling score.

    Args:
        boxes: (n, 4), x1 y1 x2 y2.
        scores: (n,).
        iou_threshold: boxes that overlap a better one by more than this are dropped.
        offset: 1 where x2 and y2 are the last pixels inside the box, 0 where they are its edges.
    """
    boxes, scores = widen(boxes, scores)
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    return torchvision.ops.nms(boxes, scores, _single(iou_threshold))


def _overlaps(box: np.ndarray, boxes: np.ndarray, offset: int = 0) -> np.ndarray:
    """Intersection over union of a box, shape (4,), with each of others, shape (n, 4); 0 where neither has an area."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]) + offset
    intersection = sides.clip(min=0).prod(axis=1)
    union = (box[2:] - box[:2] + offset).prod() + (boxes[:, 2:] - boxes[:, :2] + offset).prod(axis=1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union != 0)


def softnms(
    boxes: Tensor, scores: Tensor, dets: Tensor, *, iou_threshold: float, sigma: float, min_score: float, method: int,
    offset: int,
) -> Tensor:  # fmt: skip
    """Lower the scores of the boxes that overlap better ones (Soft-NMS, arXiv 1704.04503).

    The order is mmcv's, at equal scores too: the best of the boxes left goes to the front, in exchange for the one
    there, and a box that falls below ``min_score`` is replaced by the last.

    Args:
        boxes, scores: (n, 4), x1 y1 x2 y2, and (n,).
        dets: (n, 5); the boxes kept are written to its first rows, with their scores.
        iou_threshold: overlap from which the methods 0 and 1 lower a score.
        sigma: width of the Gaussian of method 2.
        min_score: boxes whose score falls below it are dropped.
        method: factor of a score: with 0, 0 (hard suppression); with 1, 1 - IoU; with 2, exp(-IoU^2 / sigma).
        offset: as in :func:`nms`.

    Returns:
        The indices of the boxes kept, in the order of ``dets``.
    """
    boxes, scores = widen(boxes, scores)
    rows = np.concatenate([boxes.numpy(), scores.numpy()[:, None]], axis=1)
    indices = np.arange(len(rows))
    threshold, n, i = _single(iou_threshold), len(rows), 0
    while i < n:
        best = i + rows[i:n, 4].argmax()
        rows[[i, best]], indices[[i, best]] = rows[[best, i]], indices[[best, i]]
        rest = rows[i + 1 : n]
        overlaps = _overlaps(rows[i, :4], rest[:, :4], offset)
        if method == 2:
            rest[:, 4] *= np.exp(-(overlaps**2) / sigma)
        else:
            rest[:, 4] *= np.where(overlaps >= threshold, 1 - overlaps if method == 1 else 0, 1)
        stay = rest[:, 4] >= min_score
        kept = stay.sum()
        gaps = i + 1 + np.flatnonzero(~stay[:kept])
        last = i + 1 + kept + np.flatnonzero(stay[kept:])[::-1]
        rows[gaps], indices[gaps] = rows[last], indices[last]
        i, n = i + 1, i + 1 + kept
    dets[:n] = torch.from_numpy(rows[:n])
    return torch.from_numpy(indices[:n])


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return the groups of non-maximum suppression: each kept box, then the boxes it suppresses, by falling score.

    Args:
        dets: (n, 5), x1 y1 x2 y2 and the score.
        iou_threshold: boxes that overlap a better one by this or more are suppressed.
    """
    rows = widen(dets)[0].numpy()
    left = np.argsort(-rows[:, 4], kind='stable')
    groups = []
    while len(left):
        best, rest = left[0], left[1:]
        suppressed = _overlaps(rows[best, :4], rows[rest, :4]) >= _single(iou_threshold)
        groups.append([int(best), *rest[suppressed].tolist()])
        left = rest[~suppressed]
    return groups
