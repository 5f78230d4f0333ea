"""Pooling of regions: RoIAlign and deformable RoI pooling."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from .precision import compute, compute_gradients, widen


def _check_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError("roi_align with pool_mode='max' is not provided by spec_mmdet. Use pool_mode='avg'")


def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, *_, aligned_height: int, aligned_width: int, spatial_scale: float,
    sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Write the pooled features of each region into ``output``, shape (n, C, aligned_height, aligned_width)."""
    _check_mode(pool_mode)
    input, rois = widen(input, rois)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Add the gradient of the pooled features to ``grad_input``, shape (B, C, H, W)."""
    _check_mode(pool_mode)
    grad_output, rois = widen(grad_output, rois)
    size = (aligned_height, aligned_width, *grad_input.shape)
    backward = torch.ops.torchvision._roi_align_backward
    grad_input += backward(grad_output, rois, spatial_scale, *size, sampling_ratio, aligned)


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """Return the x and y of a grid's points, shape (height, width, 2)."""
    y, x = torch.meshgrid(torch.arange(height).to(like), torch.arange(width).to(like), indexing='ij')
    return torch.stack([x, y], dim=-1)


def _bilinear(maps: Tensor, points: Tensor) -> Tensor:
    """Sample maps bilinearly, as RoIAlign does: constant for one pixel beyond the border, and 0 from there.

    Args:
        maps: (C, H, W).
        points: (..., 2), x and y in pixels.
    """
    size = points.new_tensor([maps.shape[2], maps.shape[1]])
    inside = ((points >= -1) & (points <= size)).all(-1)
    grid = ((2 * points + 1) / size - 1).reshape(1, 1, -1, 2)
    samples = F.grid_sample(maps[None], grid, padding_mode='border', align_corners=False)
    return samples.reshape(len(maps), *points.shape[:-1]) * inside


def _pool_displaced(
    input: Tensor, offset: Tensor, rois: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float,
    sampling_ratio: int, gamma: float,
) -> Tensor:  # fmt: skip
    """Compute RoIAlign with bins displaced by ``gamma * offset`` times the region's extent.

    Args:
        spatial_scale: size of the map over that of the image.
        sampling_ratio: samples per bin in each direction; 0: about one per pixel.
    """
    size = (pooled_height, pooled_width)
    rois = rois.to(input.dtype)
    corners = rois[:, 1:] * spatial_scale - 0.5
    extent = corners[:, 2:] - corners[:, :2]
    bins = extent / extent.new_tensor(size[::-1])
    starts = corners[:, None, None, :2] + _grid(*size, rois) * bins[:, None, None]
    starts = starts + gamma * extent[:, None, None] * offset.permute(0, 2, 3, 1)
    counts = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil()

    output = input.new_zeros(len(rois), input.shape[1], *size)
    # Regions of one image are pooled together if their bins have the same number of samples.
    kinds, kind_of = torch.cat([rois[:, :1], counts], dim=1).long().unique(dim=0, return_inverse=True)
    for kind, (image, across, down) in enumerate(kinds.tolist()):
        if across > 0 and down > 0:
            those = (kind_of == kind).nonzero()[:, 0]
            within = (_grid(down, across, rois) + 0.5) / rois.new_tensor([across, down])
            points = starts[those][:, :, :, None, None] + within * bins[those][:, None, None, None, None]
            output[those] = _bilinear(input[image], points).mean((-2, -1)).transpose(0, 1)
    return output


def _as_roi_align(pooled_height: int, pooled_width: int, spatial_scale: float, sampling_ratio: int, **_) -> dict:
    """Return RoIAlign's settings for deformable RoI pooling without offsets."""
    size = dict(aligned_height=pooled_height, aligned_width=pooled_width)
    return dict(**size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, pool_mode=1, aligned=True)


def deform_roi_pool_forward(input: Tensor, rois: Tensor, offset: Tensor, output: Tensor, **settings: float) -> None:
    """Write deformable RoI pooling (arXiv 1703.06211), with RoIAlign's bilinear samples, into ``output``.

    Args:
        input: (B, C, H, W).
        rois: (n, 5), the image's index and x1 y1 x2 y2.
        offset: (n, 2, pooled_height, pooled_width), the displacement across and down of each bin; or empty.
        output: (n, C, pooled_height, pooled_width).
        settings: those of :func:`_pool_displaced`.
    """
    if offset.numel():
        output.copy_(compute(partial(_pool_displaced, rois=rois, **settings), input, offset))
    else:
        roi_align_forward(input, rois, output, **_as_roi_align(**settings))


def deform_roi_pool_backward(
    grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor, grad_offset: Tensor,
    **settings: float,
) -> None:  # fmt: skip
    """Write the gradients with respect to input and offset into the tensors named after them."""
    if offset.numel():
        pool = partial(_pool_displaced, rois=rois, **settings)
        by_input, by_offset = compute_gradients(pool, (input, offset), grad_output)
        grad_input.copy_(by_input)
        grad_offset.copy_(by_offset)
    else:
        roi_align_backward(grad_output, rois, offset, offset, grad_input, **_as_roi_align(**settings))
