"""The private members of PyTorch and MMEngine that this package uses.

Checked against torch 2.14.1, MMEngine 0.10.7 and onedl-mmengine 0.10.12.
"""

from __future__ import annotations

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module; global hooks do not count."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
