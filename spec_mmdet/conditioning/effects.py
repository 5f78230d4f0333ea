"""Effects of a correction on trained weights and on softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Names of parts that normalise queries and keys in attention modules, or scale the logits after the normalisation.
_NORMALISED = {'temperature', 'logit_scale', 'q_norm', 'k_norm', 'norm_q', 'norm_k', 'q_layernorm', 'k_layernorm'}


def is_trained(model: nn.Module) -> bool | None:
    """Return whether a model's weights have been trained; None for a model without trainable normalisation layers.

    Initialisation gives all channels of a normalisation layer the same weight and the same bias.
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


def normalises_queries(attention: nn.Module) -> bool:
    """Return whether an attention module normalises queries and keys (XCA, Swin V2), so that no C saturates it."""
    parts = {name: part for name, part in attention.named_children() if not isinstance(part, nn.Identity)}
    return bool(_NORMALISED & {*parts, *dict(attention.named_parameters(recurse=False))})


@torch.no_grad()
def count_effective_keys(W_Q: Tensor, W_K: Tensor, heads: int, tokens: int = 197) -> float:
    """Compute the mean number of keys that a query of softmax(Q K^T / sqrt(d)) attends to (exp of its entropy).

    Near 1 the softmax is saturated, and passes no gradient to queries and keys.

    Args:
        W_Q: the query projection in torch's layout, shape (heads * d, k_q).
        W_K: the key projection, shape (key heads * d, k_k), of as many heads or a divisor of them.
        heads: the number of query heads.
        tokens: number of random tokens, independent and normalised. Real tokens are correlated: more keys remain.
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
