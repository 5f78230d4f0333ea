"""Weighted sums of neighbourhoods: CARAFE's upsampling, and convolutions at selected pixels."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import compute, compute_gradients


def _reassemble(features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Compute CARAFE's map as one product for each pixel: (scale * scale, k * k) times (k * k, channels).

    Channels come last in it: so the windows are copied in long pieces, four times as fast as by torch's unfold.
    """
    batch, channels, height, width = features.shape
    padded = F.pad(features.permute(0, 2, 3, 1), [0, 0] + [kernel_size // 2] * 4).contiguous()
    windows = padded.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1)  # (B, h, w, channels, k, k)
    windows = windows.unflatten(3, (group_size, -1)).permute(0, 1, 2, 3, 5, 6, 4)
    kernels = masks.view(batch, group_size, kernel_size**2, height, scale_factor, width, scale_factor)
    kernels = kernels.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5)
    pixels = kernels @ windows.flatten(4, 5)  # (B, h, w, groups, scale * scale, channels / groups)
    pixels = pixels.unflatten(4, (scale_factor, scale_factor)).permute(0, 3, 6, 1, 4, 2, 5)
    return pixels.reshape(batch, channels, height * scale_factor, width * scale_factor)


def carafe_forward(
    features: Tensor, masks: Tensor, kept: Tensor, scratch: Tensor, other: Tensor, output: Tensor, **settings: int
) -> None:
    """Write features upsampled with a kernel for each pixel of the result (CARAFE, arXiv 1905.02188) into ``output``.

    Args:
        features: (n, channels, h, w); copied to ``kept`` for the backward pass.
        masks: the kernels, shape (n, kernel_size^2 * group_size, h * scale_factor, w * scale_factor).
        output: (n, channels, h * scale_factor, w * scale_factor).
        settings: kernel_size (odd; side of the window of features that a pixel is a sum of), group_size (number of
            groups of channels with separate kernels) and scale_factor.
    """
    kept.copy_(features)
    # One image at a time: the windows of all take k * k times the memory of the features.
    for single, mask, upsampled in zip(features.split(1), masks.split(1), output.split(1)):
        upsampled.copy_(compute(partial(_reassemble, **settings), single, mask))


def carafe_backward(
    grad_output: Tensor, kept: Tensor, masks: Tensor, *scratch_and_grads: Tensor, **settings: int
) -> None:
    """Write the gradients with respect to features and masks into the last two tensors."""
    tensors = (grad_output, kept, masks, *scratch_and_grads[-2:])
    for top, *inputs, by_features, by_masks in zip(*(tensor.split(1) for tensor in tensors)):
        computed = compute_gradients(partial(_reassemble, **settings), tuple(inputs), top)
        by_features.copy_(computed[0])
        by_masks.copy_(computed[1])


def masked_im2col_forward(
    im: Tensor, rows: Tensor, columns: Tensor, col: Tensor, kernel_h: int, kernel_w: int, pad_h: int, pad_w: int
) -> None:
    """Write the values that a convolution reads at selected pixels into ``col``, with zeros outside the map.

    Args:
        im: (1, channels, h, w).
        rows, columns: of the pixels, shape (n,).
        col: (channels * kernel_h * kernel_w, n).
        pad_h, pad_w: the kernel's first row and column read so far above and left of the pixel.
    """
    padded = F.pad(im[0], [pad_w, kernel_w - 1 - pad_w, pad_h, kernel_h - 1 - pad_h])
    rows = rows + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = columns + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    col: Tensor, rows: Tensor, columns: Tensor, im: Tensor, height: int, width: int, channels: int
) -> None:
    """Write each column of ``col``, shape (channels, n), to its pixel of ``im``, shape (1, channels, height, width)."""
    im[0][:, rows, columns] = col.to(im.dtype)
