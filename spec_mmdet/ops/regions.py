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


def _average(start: Tensor, length: Tensor, bins: int, pixels: int, ratio: int) -> Tensor:
    """Return the weight of each pixel along an axis in each bin of each region: shape (n, bins, pixels).

    A bin is the mean of ``ratio`` linear interpolations, or of one per pixel of the bin if ``ratio`` is 0.

    Args:
        start, length: of the regions, in pixels, shape (n,).
    """
    step = length / bins
    count = torch.full_like(step, ratio) if ratio else step.ceil().clamp_min(0)
    sample = torch.arange(max(int(count.amax()), 1)).to(step)
    within = torch.arange(bins).to(step)[:, None] + ((sample + 0.5) / count.clamp_min(1)[:, None])[:, None]
    at = start[:, None, None] + within * step[:, None, None]  # (n, bins, samples)
    used = (sample < count[:, None])[:, None] & (at >= -1) & (at <= pixels)
    weights = 1 - (at.clamp(0, pixels - 1)[..., None] - torch.arange(pixels).to(step)).abs()
    return (weights.clamp_min(0) * used[..., None]).sum(dim=2) / count.clamp_min(1)[:, None, None]


def _make_averages(
    rois: Tensor, maps: torch.Size, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor] | None:
    """Return the weights of rows and of columns, with which RoIAlign on a CPU is two matrix products.

    torchvision's kernel uses one thread, and its backward pass is ten times slower than the products. Return None if
    the maps are large, so that most weights are zero, or a region is.
    """
    small = rois.device.type == 'cpu' and maps[2] * maps[3] <= 64**2 and len(rois)
    if not small or torch.compiler.is_compiling() or not rois[:, 1:].abs().amax() * scale < 1000:
        return None
    x0, y0, x1, y1 = (rois[:, 1:] * scale - 0.5 * aligned).T
    columns, rows = (end - start if aligned else (end - start).clamp_min(1) for start, end in ((x0, x1), (y0, y1)))
    return _average(y0, rows, height, maps[2], ratio), _average(x0, columns, width, maps[3], ratio)


@torch.autocast('cpu', enabled=False)  # or autocast would narrow the products
def roi_align_forward(
    input: Tensor, rois: Tensor, output: Tensor, *_, aligned_height: int, aligned_width: int, spatial_scale: float,
    sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Write the pooled features of each region into ``output``, shape (n, C, aligned_height, aligned_width)."""
    _check_mode(pool_mode)
    input, rois = widen(input, rois)
    rule = spatial_scale, sampling_ratio, aligned
    if (averages := _make_averages(rois, input.shape, aligned_height, aligned_width, *rule)) is None:
        output.copy_(torchvision.ops.roi_align(input, rois, (aligned_height, aligned_width), *rule))
        return
    for i in rois[:, 0].unique().int():
        own, image = (rois[:, 0] == i).nonzero()[:, 0], input[i]
        rows, columns = (each[own] for each in averages)
        pooled = (rows.flatten(0, 1) @ image.transpose(0, 1).flatten(1)).view(len(own), -1, image.shape[2]) @ columns.mT
        output[own] = pooled.unflatten(1, (aligned_height, -1)).transpose(1, 2).to(output.dtype)


@torch.autocast('cpu', enabled=False)
def roi_align_backward(
    grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor, *, aligned_height: int,
    aligned_width: int, spatial_scale: float, sampling_ratio: int, pool_mode: int, aligned: bool,
) -> None:  # fmt: skip
    """Add the gradient of the pooled features to ``grad_input``, shape (B, C, H, W)."""
    _check_mode(pool_mode)
    grad_output, rois = widen(grad_output, rois)
    size, rule = (aligned_height, aligned_width), (spatial_scale, sampling_ratio, aligned)
    if (averages := _make_averages(rois, grad_input.shape, *size, *rule)) is None:
        backward = torch.ops.torchvision._roi_align_backward
        grad_input += backward(grad_output, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned)
        return
    for i in rois[:, 0].unique().int():
        own, by_image = (rois[:, 0] == i).nonzero()[:, 0], grad_input[i]
        rows, columns = (each[own] for each in averages)
        by_rows = grad_output[own].transpose(1, 2).flatten(1, 2) @ columns
        by_pixels = rows.flatten(0, 1).T @ by_rows.view(-1, by_image.shape[0] * by_image.shape[2])
        by_image += by_pixels.unflatten(1, (by_image.shape[0], -1)).transpose(0, 1)


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
