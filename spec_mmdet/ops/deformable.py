"""Sampling at positions that the network predicts: multi-scale deformable attention and deformable convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from .precision import compute, compute_gradients, widen


def _attend(value: Tensor, locations: Tensor, weights: Tensor, size: list[int]) -> Tensor:
    """Compute one level's contribution to the attention: the arguments have no dimension of levels."""
    batch, queries, heads, points = weights.shape
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, *size)
    grid = 2 * locations.transpose(1, 2).flatten(0, 1) - 1
    samples = F.grid_sample(maps, grid, align_corners=False)  # (B * heads, d, queries, points)
    weighted = samples * weights.transpose(1, 2).reshape(batch * heads, 1, queries, points)
    return weighted.sum(-1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


def _levels(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Iterator[tuple]:
    """Yield each level's size and, as views, its other arguments of :func:`_attend`.

    One level at a time limits the memory: the samples of all levels would take most of it.
    """
    sizes = shapes.tolist()
    parts = value.split([height * width for height, width in sizes], dim=1)
    for level, (size, part) in enumerate(zip(sizes, parts)):
        yield size, (part, locations[:, :, :, level], weights[:, :, :, level])


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, **_
) -> Tensor:
    """Multi-scale deformable attention (arXiv 2010.04159): weighted sums of bilinear samples of several maps.

    Args:
        value: the maps, one behind the other, shape (B, keys, heads, d).
        shapes: height and width of each, shape (levels, 2).
        starts: unused.
        locations: (B, queries, heads, levels, points, 2), x and y from 0 to 1 over each map.
        weights: (B, queries, heads, levels, points).

    Returns:
        (B, queries, heads * d).
    """
    levels = _levels(value, shapes, locations, weights)
    return sum(compute(partial(_attend, size=size), *inputs) for size, inputs in levels).to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, grad_output: Tensor,
    grad_value: Tensor, grad_locations: Tensor, grad_weights: Tensor, **_,
) -> None:  # fmt: skip
    """Write the gradients with respect to maps, locations and weights into the tensors named after them."""
    levels = _levels(value, shapes, locations, weights)
    outputs = _levels(grad_value, shapes, grad_locations, grad_weights)
    for (size, inputs), (_, parts) in zip(levels, outputs):
        for part, gradient in zip(parts, compute_gradients(partial(_attend, size=size), inputs, grad_output)):
            part.copy_(gradient)


def _beside_the_map(offset: Tensor, kernel: torch.Size, settings: tuple[int, ...]) -> Tensor:
    """Return a mask shaped as ``offset``: True where a sample lies exactly one pixel before the first row or column."""
    along = []  # for each axis the samples' positions at offset 0, (kernel positions, size)
    strides, paddings, dilations = settings[:2], settings[2:4], settings[4:6]
    for size, places, stride, padding, dilation in zip(offset.shape[2:], kernel, strides, paddings, dilations):
        starts = torch.arange(size, device=offset.device) * stride - padding
        along.append(starts + torch.arange(places, device=offset.device)[:, None] * dilation)
    y, x = along[0][:, None, :, None], along[1][:, None, :]
    by_y, by_x = offset.unflatten(1, (-1, *kernel, 2)).unbind(4)
    return torch.stack([by_y + y == -1, by_x + x == -1], dim=4).flatten(1, 4)


def _differentiate(
    grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, *settings: int
) -> list[Tensor]:
    """Compute torchvision's gradients with respect to input, weight, offset, mask and bias.

    Args:
        settings: stride, padding and dilation, each down and across, groups and groups of offsets.
    """
    use_mask = mask is not None
    bias = weight.new_zeros(len(weight))
    mask = mask if use_mask else input.new_zeros(len(input), 1)
    grad_output, input, weight, offset, mask, bias = widen(grad_output, input, weight, offset, mask, bias)
    backward = torch.ops.torchvision._deform_conv2d_backward
    computed = list(backward(grad_output, input, weight, offset, mask, bias, *settings, use_mask))
    # Samples have a kink there: torchvision's gradient is the slope inside, mmcv's is 0. Training starts with offsets
    # of 0, where padding puts the samples of all borders.
    computed[2] = computed[2].masked_fill(_beside_the_map(offset, weight.shape[2:], settings), 0)
    return computed


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, *_,
    dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, **__,
) -> None:  # fmt: skip
    """Write the deformable convolution (arXiv 1703.06211) into ``output``.

    Args:
        input: (B, C_in, H, W).
        weight: (C_out, C_in / groups, kH, kW).
        offset: (B, offset groups * kH * kW * 2, H_out, W_out), y and x of each position of the kernel, in pixels.
        output: (B, C_out, H_out, W_out).
        dW, dH: horizontal and vertical stride.
    """
    input, weight, offset = widen(input, weight, offset)
    settings = dict(stride=(dH, dW), padding=(padH, padW), dilation=(dilationH, dilationW))
    output.copy_(torchvision.ops.deform_conv2d(input, offset, weight, **settings))


def deform_conv_backward_input(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_input: Tensor, grad_offset: Tensor, weight: Tensor, *_,
    dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int, **__,
) -> None:  # fmt: skip
    """Write the gradients with respect to input and offset into the tensors named after them."""
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    by_input, _, by_offset, _, _ = _differentiate(grad_output, input, weight, offset, None, *settings)
    grad_input.copy_(by_input)
    grad_offset.copy_(by_offset)


def deform_conv_backward_parameters(
    input: Tensor, offset: Tensor, grad_output: Tensor, grad_weight: Tensor, *_,
    dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
    scale: float, **__,
) -> None:  # fmt: skip
    """Add ``scale`` times the gradient with respect to the weight to ``grad_weight``."""
    settings = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # The gradient does not depend on the weight's values.
    grad_weight += scale * _differentiate(grad_output, input, grad_weight, offset, None, *settings)[1]


def _leading(tensor: Tensor, output: Tensor) -> Tensor:
    """Return what mmcv's kernels read of offsets or factors larger than the output: each image's first numbers.

    The kernels index the memory with the output's size. DyHead passes offsets of a map twice as large.
    """
    channels, size = tensor.shape[1], output.shape[2:]
    if tensor.shape[2:].numel() <= size.numel():
        return tensor
    return tensor.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


def _write_leading(gradient: Tensor, computed: Tensor) -> None:
    """Write the gradient with respect to what :func:`_leading` returns, and 0 after it."""
    missing = gradient[0].numel() - computed[0].numel()
    gradient.copy_(F.pad(computed.flatten(1), [0, missing]).view_as(gradient))


def modulated_deform_conv_forward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, output: Tensor, *_,
    stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int, with_bias: bool, **__,
) -> None:  # fmt: skip
    """Write the modulated deformable convolution (arXiv 1811.11168) into ``output``.

    Args:
        input, weight, offset, output: as for :func:`deform_conv_forward`.
        bias: (C_out,) if ``with_bias``.
        ones: unused.
        mask: the factors, (B, offset groups * kernel_h * kernel_w, H_out, W_out).
    """
    input, weight, bias, offset, mask = widen(input, weight, bias, _leading(offset, output), _leading(mask, output))
    settings = dict(stride=(stride_h, stride_w), padding=(pad_h, pad_w), dilation=(dilation_h, dilation_w))
    bias = bias if with_bias else None
    output.copy_(torchvision.ops.deform_conv2d(input, offset, weight, bias, mask=mask, **settings))


def modulated_deform_conv_backward(
    input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor, mask: Tensor, columns: Tensor,
    grad_input: Tensor, grad_weight: Tensor, grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor,
    grad_output: Tensor, *, stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
    group: int, deformable_group: int, with_bias: bool, **_,
) -> None:  # fmt: skip
    """Write the gradients with respect to input, weight, bias, offset and mask into the tensors named after them."""
    settings = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    by_input, by_weight, by_offset, by_mask, by_bias = _differentiate(
        grad_output, input, weight, _leading(offset, grad_output), _leading(mask, grad_output), *settings
    )
    grad_input.copy_(by_input)
    grad_weight.copy_(by_weight)
    _write_leading(grad_offset, by_offset)
    _write_leading(grad_mask, by_mask)
    if with_bias:
        grad_bias.copy_(by_bias)
