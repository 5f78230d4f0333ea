"""Check that a weight is a plain tensor, to which a correction can be added."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_fault(module: nn.Module, tensor: str) -> str | None:
    """The reason why a module's tensor is no weight that a correction can be added to; None if it is one."""
    if parametrize.is_parametrized(module, tensor):
        return 'has a parametrization that is not a Correction; remove it before conditioning'
    if tensor not in dict(module.named_parameters(recurse=False)):
        return 'is recomputed by a hook, as by weight_norm, spectral_norm or prune; remove that before conditioning'
    weight = getattr(module, tensor)
    if not weight.numel():
        return f'has the shape {tuple(weight.shape)}: no rows or no columns'
    if weight.dtype not in _FLOATS or type(weight.data) is not Tensor:
        kind = weight.dtype if type(weight.data) is Tensor else type(weight.data).__name__
        return f'is quantised ({kind}); condition the model before quantising it'
    if weight.is_inference():
        return 'was made under torch.inference_mode and cannot be changed; build the model outside of it'
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride())):
        return 'is an expanded tensor, whose entries share memory; replace it by its clone() first'
    if not weight.is_meta and not weight.isfinite().all():
        return 'contains NaN or inf; use other weights'
    return None
