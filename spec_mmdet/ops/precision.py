"""Compute operators in single precision at least, whatever the precision of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> list[Tensor]:
    """Convert tensors to their common type, single precision at least.

    Many CPU kernels have no half-precision form, and in bfloat16 a box at 1000 pixels is off by 4. Under autocast, an
    operator's inputs often have different types.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def compute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call ``function`` with the widened inputs, without autocast, which would narrow them again."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*widen(*inputs))


def compute_gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Tensor, ...]:
    """Compute gradients with respect to ``inputs`` of ``compute(function, *inputs)`` for given output gradients."""
    with torch.enable_grad():
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        output = compute(function, *inputs)
        return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
