"""Steps of batch normalisation over several processes; mmcv sums between them (``MMSyncBN`` in configs)."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import widen


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel of ``input``, shape (B, C, n), into ``mean``, shape (C,)."""
    mean.copy_(widen(input)[0].mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean square of each channel's distance to ``mean`` into ``var``, both of shape (C,)."""
    var.copy_((input - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    norm: Tensor, std: Tensor, output: Tensor, *, eps: float, momentum: float | Tensor, group_size: int,
) -> None:  # fmt: skip
    """Write the input, normalised and (``output``) with the affine map, and move the running statistics.

    Args:
        input: (B, C, n), like ``norm`` and ``output``; all others are of shape (C,).
        mean, var: of all processes, in single precision.
        momentum: with which the running statistics move to the mean and the unbiased variance.
        group_size: the number of processes.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((input - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    count = input[:, 0].numel() * group_size
    running_mean.lerp_(mean, torch.as_tensor(momentum).to(mean))
    running_var.lerp_(var * (count / max(count - 1, 1)), torch.as_tensor(momentum).to(var))


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write this process's gradients with respect to weight and bias, shape (C,)."""
    grad_weight.copy_((grad_output * norm).sum((0, 2)))
    grad_bias.copy_(widen(grad_output)[0].sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor, std: Tensor,
    grad_input: Tensor,
) -> None:  # fmt: skip
    """Write the gradient with respect to the input; those of weight and bias are averaged over the processes."""
    shared = (grad_weight[:, None] * norm + grad_bias[:, None]) / grad_output[:, 0].numel()
    grad_input.copy_((weight / std)[:, None] * (grad_output - shared))
