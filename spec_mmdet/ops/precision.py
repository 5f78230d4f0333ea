"""Computing in single precision at least, whatever the operator is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the one type that holds all of them, single precision at least.

    On a CPU many of the kernels have no half form, and in half precision a box at 1000 pixels is off by 4. Under
    autocast, what comes together is often half in part.
    """
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def compute(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """``function`` of the widened inputs, with autocast off, which would make half tensors of them again."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*widen(*inputs))


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_output: Tensor) -> tuple[Tensor, ...]:
    """The gradients by ``inputs``, of whose function :func:`compute` makes what has the gradient ``grad_output``."""
    with torch.enable_grad():
        inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        output = compute(function, *inputs)
        return torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
