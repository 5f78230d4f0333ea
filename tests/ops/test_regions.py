"""Compare RoIAlign and deformable RoI pooling, through mmcv's own functions, with one sample at a time."""

import mmcv.ops
import pytest
import torch
from plain import assert_same_with_gradients, bilinear


def held_bilinear(maps, y, x):
    """Sample as RoIAlign does: the border's value up to a pixel beyond the border, and 0 further out."""
    height, width = maps.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(maps), dtype=maps.dtype)
    return bilinear(maps, y.clamp(0, height - 1), x.clamp(0, width - 1))


def plain_roi_align(feats, rois, size, scale, ratio, offset=None, gamma=0.1):
    """Compute RoIAlign (aligned) as defined by detectron2, one sample at a time: each bin's mean. Deformable pooling
    displaces each bin by ``offset`` (n, 2, size, size)."""
    outputs = []
    for n, (index, *corners) in enumerate(rois.tolist()):
        x0, y0, x1, y1 = (c * scale - 0.5 for c in corners)
        step_y, step_x = (y1 - y0) / size, (x1 - x0) / size
        n_y, n_x = (ratio or max(int(-(-step // 1)), 0) for step in (step_y, step_x))
        pooled = []
        for row in range(size):
            for column in range(size):
                by_x, by_y = offset[n, :, row, column] * gamma if offset is not None else feats.new_zeros(2)
                samples = [torch.zeros(feats.shape[1], dtype=feats.dtype)]
                for i in range(n_y):
                    for j in range(n_x):
                        y = y0 + (row + (i + 0.5) / n_y) * step_y + by_y * (y1 - y0)
                        x = x0 + (column + (j + 0.5) / n_x) * step_x + by_x * (x1 - x0)
                        samples.append(held_bilinear(feats[int(index)], y, x))
                pooled.append(sum(samples) / max(n_y * n_x, 1))
        outputs.append(torch.stack(pooled, dim=1).unflatten(1, (size, size)))
    return torch.stack(outputs)


ROIS = [
    [0, 3.2, 1.7, 17.9, 12.4],
    [1, -9.0, -6.0, 11.0, 40.0],  # partly outside
    [1, 30.0, 25.0, 70.0, 45.0],  # beyond the far corner
    [0, 100.0, 100.0, 120.0, 130.0],  # completely outside
    [0, 5.0, 5.0, 5.0, 5.0],  # empty
]


@pytest.mark.parametrize('shape', [(12, 15), (65, 64)])
@pytest.mark.parametrize('ratio', [0, 2])
def test_roi_align(ratio, shape):
    # The third image has no region. On maps of more than 64**2 pixels, the kernel is torchvision's.
    feats = torch.randn(3, 3, *shape, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    pool = mmcv.ops.RoIAlign(output_size=3, spatial_scale=0.25, sampling_ratio=ratio, aligned=True)
    assert_same_with_gradients(
        lambda feats: pool(feats, rois), lambda feats: plain_roi_align(feats, rois, 3, 0.25, ratio), feats
    )


@pytest.mark.parametrize('ratio', [0, 2])
def test_deform_roi_pool(ratio):
    feats = torch.randn(2, 3, 12, 15, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(len(ROIS), 2, 3, 3, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor(ROIS, dtype=torch.float64)
    pool = mmcv.ops.DeformRoIPool(3, 0.25, ratio)
    assert_same_with_gradients(
        lambda feats: pool(feats, rois), lambda feats: plain_roi_align(feats, rois, 3, 0.25, ratio), feats
    )
    assert_same_with_gradients(
        lambda feats, offset: pool(feats, rois, offset),
        lambda feats, offset: plain_roi_align(feats, rois, 3, 0.25, ratio, offset),
        feats,
        offset,
    )


def test_roi_align_without_regions():
    feats = torch.randn(1, 3, 8, 8, requires_grad=True)
    pooled = mmcv.ops.roi_align(feats, torch.zeros(0, 5), 7, 0.25, 0, 'avg', True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert not feats.grad.any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('same', [True, False])
def test_roi_align_in_half_precision(dtype, same):
    """Computed in single precision: the values of the same numbers, rounded once."""
    feats = torch.randn(2, 3, 12, 15).to(dtype).requires_grad_()
    rois = torch.tensor(ROIS).to(dtype if same else torch.float32)
    single = feats.detach().float().requires_grad_()
    pooled = mmcv.ops.roi_align(feats, rois, 3, 0.25, 0, 'avg', True)
    expected = mmcv.ops.roi_align(single, rois.float(), 3, 0.25, 0, 'avg', True)
    assert pooled.dtype == dtype and torch.equal(pooled, expected.to(dtype))
    weights = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), feats)
    (expected,) = torch.autograd.grad((expected * weights.float()).sum(), single)
    assert gradient.dtype == dtype and torch.equal(gradient, expected.to(dtype))


def test_maximum_of_samples_is_refused():
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        mmcv.ops.roi_align(torch.rand(1, 1, 8, 8), torch.zeros(1, 5), 2, 1.0, 0, 'max', True)
