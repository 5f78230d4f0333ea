"""Spectral conditioning: fixed corrections that make attention's Jacobian well conditioned.

The method of Saratchandran & Lucey, "Spectral Conditioning of Attention" (arXiv 2603.07162). Attention is given a
fixed correction C on each of its projections,

    SpecA(X) = softmax(X (W_Q + C_Q) (W_K + C_K)^T X^T) X (W_V + C_V),

because the condition number of its Jacobian is bounded by those of the projections, kappa(W) = sigma_max / sigma_min.
C is set once, gets no gradient and no weight decay; W goes on training. This module needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError


def condition_number(W: Tensor) -> Tensor:
    """kappa(W) = sigma_max / sigma_min, computed in float64.

    Args:
        W: matrices, shape (..., D, k).

    Returns:
        float64, shape (...). Infinite where sigma_min is zero (a singular or zero matrix).
    """
    sigma = torch.linalg.svdvals(W.detach().double())
    return torch.where(sigma[..., -1] > 0, sigma[..., 0] / sigma[..., -1], torch.inf)


def svd_correction(W: Tensor) -> Tensor:
    """The exact correction C = sigma_max U V^T for W = U S V^T (Theorem 3.5), so that kappa(W + C) <= 2.

    W + C = U (S + sigma_max I) V^T, hence kappa(W + C) = 2 sigma_max / (sigma_min + sigma_max). U V^T is the thin
    polar factor when W is rectangular; where W is rank-deficient any completion the SVD returns serves.

    Args:
        W: matrices, shape (..., D, k).

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return (S[..., :1, None] * (U @ Vh)).to(W)


def identity_correction(W: Tensor, lam: float) -> Tensor:
    """The cheap correction C = lam I_{D x k} (Theorem 3.8): no SVD, nothing to store.

    For lam > sigma_max(W), kappa(W + C) <= (lam + sigma_max) / (lam - sigma_max). A lam at or below sigma_max can
    make the condition number worse.

    Args:
        W: matrices, shape (..., D, k).
        lam: lambda of the paper, whose experiments use 10.

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    return lam * torch.eye(W.shape[-2], W.shape[-1], dtype=W.dtype, device=W.device).expand_as(W)


class Correction(nn.Module):
    """W -> W + C for a weight that stacks several projections, with C fixed when this module is made.

    The state dict says which conditioning it belongs to: the identity form keeps the scalar ``lam``, the exact form
    the matrix ``C``, which training has long made impossible to recompute from W.

    Args:
        weight: the stacked projections, shape (blocks * D, k), for instance XCiT's qkv with three blocks.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5).
        lam: lambda of the identity form; 10 if not given, as in the paper.
        blocks: how many projections are stacked along the first dimension; each is corrected by itself.

    Raises:
        ValueError: on an unknown type, a ``lam`` that is not positive, or one given to the 'svd' form.
    """

    def __init__(self, weight: Tensor, type: str = 'identity', lam: float | None = None, blocks: int = 3) -> None:
        super().__init__()
        W = weight.detach().unflatten(0, (blocks, -1))
        if type == 'identity':
            lam = 10.0 if lam is None else float(lam)
            if not 0 < lam < float('inf'):
                raise ValueError(f'conditioning: lam must be positive and finite, got {lam}')
            self.register_buffer('lam', torch.tensor(lam, dtype=torch.float64))
            self.register_buffer('C', identity_correction(W, lam).flatten(0, 1), persistent=False)
        elif type == 'svd':
            if lam is not None:
                raise ValueError("conditioning: 'svd' takes its scale from W and has no lam")
            self.register_buffer('C', svd_correction(W).flatten(0, 1))
        else:
            raise ValueError(f"conditioning: type must be 'identity' or 'svd', got {type!r}")

    def forward(self, W: Tensor) -> Tensor:
        """W + C, shape (blocks * D, k)."""
        return W + self.C


def describe_conditioning(state_dict: dict[str, Tensor]) -> str:
    """Say in words which conditioning the weights in a state dict were made with, in the form configs use."""
    described = set()
    for key, value in state_dict.items():
        if key.endswith('correction.lam'):
            described.add(f"dict(type='identity', lam={value.item():g})")
        elif key.endswith('correction.C'):
            described.add("dict(type='svd')")
    return ' and '.join(sorted(described)) or 'None'


def require_same_conditioning(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Refuse weights made with another conditioning than the model's: they would mean something else in it.

    Args:
        theirs: the state dict to be loaded.
        ours: the model's own.

    Raises:
        InputError: if the two differ.
    """
    made_with, configured = describe_conditioning(theirs), describe_conditioning(ours)
    if made_with != configured:
        raise InputError(
            f'the weights were made with conditioning={made_with}, but the backbone is configured with '
            f'conditioning={configured}. Set conditioning={made_with} in the config, or use weights made with the '
            'configured conditioning.'
        )
