"""Compare suppression, through mmcv's own functions, with plain loops."""

import mmcv.ops
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def overlap(a, b, offset):
    """Compute IoU in mmcv's single precision."""
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    inter = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
    union = sum(areas) - inter
    return np.float32(inter) / np.float32(union) if union else np.float32(0)


def plain_nms(boxes, scores, threshold, offset):
    """Suppress greedily: by falling score (first come first at ties) a box is kept if it overlaps no kept one."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j], offset) <= np.float32(threshold) for j in kept):
            kept.append(i)
    return kept


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Suppress one box after the other, as the compiled operator exchanges them; return indices and scores."""
    rows = [[i, np.float32(score)] for i, score in enumerate(scores)]
    i = 0
    while i < len(rows):
        best = max(range(i, len(rows)), key=lambda j: (rows[j][1], -j))
        rows[i], rows[best] = rows[best], rows[i]
        j = i + 1
        while j < len(rows):
            iou = overlap(boxes[rows[i][0]], boxes[rows[j][0]], offset)
            over = iou >= np.float32(threshold)
            factor = {'naive': 1 - over, 'linear': 1 - iou * over, 'gaussian': np.exp(-iou * iou / np.float32(sigma))}
            rows[j][1] *= np.float32(factor[method])
            if rows[j][1] < np.float32(min_score):
                last = rows.pop()
                if j < len(rows):
                    rows[j] = last
            else:
                j += 1
        i += 1
    return [row[0] for row in rows], [row[1] for row in rows]


# Small integer coordinates and few scores: ties of both, boxes without area, boxes on top of each other.
ROWS = st.lists(st.tuples(*[st.integers(0, 6)] * 4, st.sampled_from([0.25, 0.5, 0.75])), max_size=12)


def boxes_and_scores(rows):
    return [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d, _ in rows], [row[4] for row in rows]


@given(ROWS, st.sampled_from([0.3, 0.45, 0.7]), st.sampled_from([0, 1]))
def test_nms(rows, threshold, offset):
    boxes, scores = boxes_and_scores(rows)
    dets, kept = mmcv.ops.nms(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores), threshold, offset)
    assert kept.tolist() == plain_nms(boxes, scores, threshold, offset)
    assert dets.tolist() == [[*boxes[i], scores[i]] for i in kept]


def test_batched_nms_keeps_classes_apart():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]]).float()
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 0, 0])
    cfg = dict(type='nms', iou_threshold=0.5)
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg)[1].tolist() == [0, 1, 3]
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg, class_agnostic=True)[1].tolist() == [0, 3]
    # The path of many boxes: class by class.
    assert mmcv.ops.batched_nms(boxes, scores, classes, dict(cfg, split_thr=1))[1].tolist() == [0, 1, 3]


@given(
    ROWS, st.sampled_from(['naive', 'linear', 'gaussian']), st.sampled_from([1e-3, 0.2, 0.3]), st.sampled_from([0, 1])
)
def test_soft_nms(rows, method, min_score, offset):
    boxes, scores = boxes_and_scores(rows)
    tensors = torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores)
    dets, kept = mmcv.ops.soft_nms(*tensors, 0.3, 0.5, min_score, method, offset)
    indices, lowered = plain_soft_nms(boxes, scores, 0.3, 0.5, min_score, method, offset)
    assert kept.tolist() == indices
    assert dets[:, :4].tolist() == [boxes[i] for i in indices]
    np.testing.assert_allclose(dets[:, 4], lowered, rtol=1e-6)


@given(ROWS, st.sampled_from([0.3, 0.45, 0.7]))
def test_nms_match(rows, threshold):
    boxes, scores = boxes_and_scores(rows)
    left, groups = sorted(range(len(rows)), key=lambda i: -scores[i]), []
    while left:
        groups.append(
            [i for i in left if i == left[0] or overlap(boxes[left[0]], boxes[i], 0) >= np.float32(threshold)]
        )
        left = [i for i in left if i not in groups[-1]]
    dets = torch.tensor([[*box, score] for box, score in zip(boxes, scores)]).reshape(-1, 5).float()
    assert [group.tolist() for group in mmcv.ops.nms_match(dets, threshold)] == groups
    assert [group.tolist() for group in mmcv.ops.nms_match(dets.numpy(), threshold)] == groups


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_suppression_in_half_precision(dtype):
    """Under autocast scores are in half precision and boxes mostly not; the result has the same boxes."""
    boxes = torch.rand(200, 4).mul(100).cumsum(1)[:, [0, 1, 2, 3]]
    scores, classes = torch.rand(200).to(dtype), torch.randint(3, (200,))
    cfg = dict(type='nms', iou_threshold=0.5)
    for exact in (boxes, boxes.round().to(dtype)):
        kept = mmcv.ops.nms(exact, scores, 0.5)[1]
        assert kept.tolist() == mmcv.ops.nms(exact.float(), scores.float(), 0.5)[1].tolist()
    dets, kept = mmcv.ops.batched_nms(boxes, scores, classes, cfg)
    expected, order = mmcv.ops.batched_nms(boxes, scores.float(), classes, cfg)
    assert kept.tolist() == order.tolist() and torch.equal(dets, expected)
    soft, kept = mmcv.ops.soft_nms(boxes, scores)
    assert kept.tolist() == mmcv.ops.soft_nms(boxes, scores.float())[1].tolist() and soft.dtype == boxes.dtype
