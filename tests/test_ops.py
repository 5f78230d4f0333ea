"""The operators that torchvision serves, through mmcv's own functions, against plain formulas."""

import subprocess
import sys

import mmcv.ops
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def plain_roi_align(feats, rois, size, scale, ratio):
    """RoIAlign (aligned) as defined by detectron2: mean of bilinear samples, differentiable, one point at a time."""
    outputs = []
    for index, *corners in rois.tolist():
        x0, y0, x1, y1 = (c * scale - 0.5 for c in corners)
        step_y, step_x = (y1 - y0) / size, (x1 - x0) / size
        n_y, n_x = (ratio or max(int(-(-step // 1)), 0) for step in (step_y, step_x))
        pooled = []
        for row in range(size):
            for column in range(size):
                samples = [torch.zeros(feats.shape[1], dtype=feats.dtype)]
                for i in range(n_y):
                    for j in range(n_x):
                        y = y0 + (row + (i + 0.5) / n_y) * step_y
                        x = x0 + (column + (j + 0.5) / n_x) * step_x
                        samples.append(bilinear(feats[int(index)], y, x))
                pooled.append(sum(samples) / max(n_y * n_x, 1))
        outputs.append(torch.stack(pooled, dim=1).unflatten(1, (size, size)))
    return torch.stack(outputs)


def bilinear(feat, y, x):
    height, width = feat.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(feat.shape[0], dtype=feat.dtype)
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = feat[:, top, left] * (1 - dx) + feat[:, top, right] * dx
    below = feat[:, bottom, left] * (1 - dx) + feat[:, bottom, right] * dx
    return above * (1 - dy) + below * dy


ROIS = [
    [0, 3.2, 1.7, 17.9, 12.4],
    [1, -9.0, -6.0, 11.0, 40.0],  # partly outside
    [1, 30.0, 25.0, 70.0, 45.0],  # beyond the far corner
    [0, 100.0, 100.0, 120.0, 130.0],  # wholly outside
    [0, 5.0, 5.0, 5.0, 5.0],  # empty
]


@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align_values_and_gradients(ratio):
    feats = torch.randn(2, 3, 12, 15, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    pooled = mmcv.ops.RoIAlign(output_size=3, spatial_scale=0.25, sampling_ratio=ratio, aligned=True)(feats, rois)
    expected = plain_roi_align(feats, rois, 3, 0.25, ratio)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), feats)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), feats)
    torch.testing.assert_close(gradient, expected_gradient)


def test_roi_align_without_regions():
    feats = torch.randn(1, 3, 8, 8, requires_grad=True)
    pooled = mmcv.ops.roi_align(feats, torch.zeros(0, 5), 7, 0.25, 0, 'avg', True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert not feats.grad.any()


def plain_nms(boxes, scores, threshold, offset):
    """Greedy suppression: of the boxes by falling score (first come first at ties) each must not overlap a kept
    one, in mmcv's single precision."""

    def overlap(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0]) + offset
        height = min(a[3], b[3]) - max(a[1], b[1]) + offset
        inter = max(width, 0) * max(height, 0)
        areas = [(c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)]
        union = sum(areas) - inter
        return np.float32(inter) / np.float32(union) if union else 0

    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j]) <= np.float32(threshold) for j in kept):
            kept.append(i)
    return kept


@given(
    # Small whole coordinates and few scores: ties of both, boxes without area, boxes over each other.
    st.lists(st.tuples(*[st.integers(0, 6)] * 4, st.sampled_from([0.25, 0.5, 0.75])), max_size=12),
    st.sampled_from([0.3, 0.45, 0.7]),
    st.sampled_from([0, 1]),
)
def test_nms(rows, threshold, offset):
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d, _ in rows]
    scores = [row[4] for row in rows]
    dets, kept = mmcv.ops.nms(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(scores), threshold, offset)
    assert kept.tolist() == plain_nms(boxes, scores, threshold, offset)
    assert dets.tolist() == [[*boxes[i], scores[i]] for i in kept]


def test_batched_nms_keeps_classes_apart():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]]).float()
    scores, classes = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 1, 0, 0])
    cfg = dict(type='nms', iou_threshold=0.5)
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg)[1].tolist() == [0, 1, 3]
    assert mmcv.ops.batched_nms(boxes, scores, classes, cfg, class_agnostic=True)[1].tolist() == [0, 3]
    # The way many boxes go: class by class.
    assert mmcv.ops.batched_nms(boxes, scores, classes, dict(cfg, split_thr=1))[1].tolist() == [0, 1, 3]


def test_focal_loss_and_its_gradient():
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(6, (40,))  # the last is none of the classes
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, 'none')
    p = logits.sigmoid()
    is_target = target[:, None] == torch.arange(5)
    plain = torch.where(is_target, -0.3 * (1 - p) ** 1.5 * p.log(), -0.7 * p**1.5 * (1 - p).log())
    torch.testing.assert_close(loss, plain)
    weights = torch.rand_like(loss)
    gradients = [torch.autograd.grad((form * weights).sum(), logits)[0] for form in (loss, plain)]
    torch.testing.assert_close(*gradients)


def test_other_operators_say_what_is_missing():
    with pytest.raises(NotImplementedError, match='softnms is a compiled operator of mmcv.*Install a compiled mmcv'):
        mmcv.ops.soft_nms(torch.rand(3, 4), torch.rand(3))
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        mmcv.ops.roi_align(torch.rand(1, 1, 8, 8), torch.zeros(1, 5), 2, 1.0, 0, 'max', True)


def test_a_compiled_mmcv_takes_precedence(tmp_path):
    (tmp_path / '_ext.py').write_text('compiled = True\ndef __getattr__(name): return print')
    code = (
        f'import mmcv; mmcv.__path__.append({str(tmp_path)!r})\n'
        'import spec_mmdet, mmcv._ext; assert mmcv._ext.compiled and mmcv._ext.nms is print'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
