"""Weighted sums of neighbourhoods: CARAFE's upsampling, and convolutions at some of the pixels only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def _taps(features: Tensor, masks: Tensor, kernel_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each place of the kernel the features there and its masks, as views that multiply to the upsampled map.

    Args:
        features: padded by half of the kernel, shape (n, groups, channels / groups, h + k - 1, w + k - 1).
        masks: (n, groups, k * k, h, scale, w, scale).

    Yields:
        (n, groups, channels / groups, h, 1, w, 1) and (n, groups, 1, h, scale, w, scale).
    """
    height, width = masks.shape[3], masks.shape[5]
    for tap in range(kernel_size**2):
        y, x = divmod(tap, kernel_size)
        window = features[..., y : y + height, x : x + width]
        yield window[..., :, None, :, None], masks[:, :, tap, None]


def _split(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> tuple[Tensor, Tensor]:
    """Features, padded, and masks in the shapes of :func:`_taps`."""
    features, masks = widen(features, masks)
    height, width = features.shape[-2:]
    padded = F.pad(features, [kernel_size // 2] * 4).unflatten(1, (group_size, -1))
    masks = masks.unflatten(3, (width, scale_factor)).unflatten(2, (height, scale_factor))
    return padded, masks.unflatten(1, (group_size, -1))


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Write features upsampled with a kernel for each pixel of the result (CARAFE, arXiv 1905.02188) into ``output``.

    Args:
        features: (n, channels, h, w).
        masks: the kernels, shape (n, kernel_size^2 * group_size, h * scale_factor, w * scale_factor).
        output: (n, channels, h * scale_factor, w * scale_factor).
        kernel_size: odd; each pixel is a sum over so many by so many of the features around its own.
        group_size: number of groups of channels, each with kernels of its own.
        scale_factor: how many times larger the result is.
    """
    padded, split = _split(features, masks, kernel_size, group_size, scale_factor)
    total = split.new_zeros(*padded.shape[:3], *split.shape[3:])
    for window, mask in _taps(padded, split, kernel_size):
        total.addcmul_(window, mask)
    output.copy_(total.view_as(output))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients by features and masks into ``bottom_grad`` and ``mask_grad``, of their shapes."""
    padded, split = _split(features, masks, kernel_size, group_size, scale_factor)
    top = top_grad.to(padded.dtype).reshape(*padded.shape[:3], *split.shape[3:])
    padded_grad, split_grad = torch.zeros_like(padded), torch.zeros_like(split)
    places = _taps(padded, split, kernel_size)
    gradients = _taps(padded_grad, split_grad, kernel_size)
    for (window, mask), (window_grad, single_mask_grad) in zip(places, gradients):
        window_grad += (top * mask).sum((-3, -1), keepdim=True)
        single_mask_grad += (top * window).sum(2, keepdim=True)
    border = kernel_size // 2
    height, width = features.shape[-2:]
    bottom_grad.copy_(padded_grad[..., border : border + height, border : border + width].flatten(1, 2))
    mask_grad.copy_(split_grad.reshape_as(mask_grad))


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """:func:`carafe_naive_forward`; ``rfeatures``, of the shape of the features, keeps them for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """:func:`carafe_naive_backward`, of the features that :func:`carafe_forward` has kept."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write what a convolution reads at some pixels, zeros outside, into ``col``.

    Args:
        im: (1, channels, h, w).
        mask_h_idx: rows of the pixels, shape (n,).
        mask_w_idx: columns of the pixels, shape (n,).
        col: (channels * kernel_h * kernel_w, n).
        kernel_h: height of the kernel; its first row reads ``pad_h`` above the pixel.
        kernel_w: width of the kernel; its first column reads ``pad_w`` left of the pixel.
        pad_h: see ``kernel_h``.
        pad_w: see ``kernel_w``.
    """
    padded = F.pad(im[0], [pad_w, kernel_w - 1 - pad_w, pad_h, kernel_h - 1 - pad_h])
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write each column of ``col``, shape (channels, n), to its pixel of ``im``, shape (1, channels, height, width)."""
    im[0][:, mask_h_idx, mask_w_idx] = col.to(im.dtype)
