"""What a correction does to a model that is there: to trained weights, and to softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# By these names attention modules hold what normalises queries and keys, or scales the logits once they are normalised.
_NORMALISED = {'temperature', 'logit_scale', 'q_norm', 'k_norm', 'norm_q', 'norm_k', 'q_layernorm', 'k_layernorm'}


def is_trained(model: nn.Module) -> bool | None:
    """Whether a model's weights have been trained; None where that cannot be told.

    Every initialisation gives a normalisation layer the same weight, and the same bias, in all of its channels, and
    no training leaves them so. A model without such layers, or with frozen ones alone, does not tell.
    """
    untouched = None
    for module in model.modules():
        if 'norm' not in type(module).__name__.lower():
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1 and len(parameter) > 1:
                if (parameter != parameter[0]).any():
                    return True
                if parameter.requires_grad:
                    untouched = False
    return untouched


def normalises(attention: nn.Module) -> bool:
    """Whether an attention module normalises queries and keys, as XCA and Swin V2 do: then no C can saturate it."""
    parts = {name: part for name, part in attention.named_children() if not isinstance(part, nn.Identity)}
    return bool(_NORMALISED & {*parts, *dict(attention.named_parameters(recurse=False))})


@torch.no_grad()
def count_effective_keys(W_Q: Tensor, W_K: Tensor, heads: int, tokens: int = 197) -> float:
    """How many keys a query of softmax(Q K^T / sqrt(d)) attends to: exp of the entropy of its row, in the mean.

    Where that is near 1 the softmax is saturated, and hands on no gradient to the queries and keys.

    Args:
        W_Q: the query projection in torch's layout, shape (heads * d, k_q).
        W_K: the key projection, shape (key heads * d, k_k), of as many heads or a divisor of them.
        heads: the number of query heads.
        tokens: how many are drawn: independent, and normalised as LayerNorm leaves them. Real tokens resemble each
            other, and leave more.

    Returns:
        From 1 to ``tokens``.
    """
    generator = torch.Generator().manual_seed(0)
    W_Q, W_K = W_Q.float().cpu(), W_K.float().cpu()
    drawn = [torch.randn(tokens, width, generator=generator) for width in sorted({W_Q.shape[1], W_K.shape[1]})]
    x = {X.shape[1]: nn.functional.layer_norm(X, X.shape[1:]) for X in drawn}
    q = (x[W_Q.shape[1]] @ W_Q.T).unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, tokens, d)
    d = q.shape[-1]
    k = (x[W_K.shape[1]] @ W_K.T).unflatten(1, (-1, d)).transpose(0, 1)
    k = k.repeat_interleave(heads // len(k), dim=0)
    log_P = (q @ k.mT / d**0.5).log_softmax(dim=-1)
    return (-(log_P.exp() * log_P).sum(dim=-1)).exp().mean().item()
