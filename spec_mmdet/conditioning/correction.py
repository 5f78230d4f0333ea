"""The corrections themselves (arXiv 2603.07162, Theorems 3.5 and 3.8), and how a state dict tells of them."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import InputError
from .rows import Stack


def condition_number(W: Tensor, rank: int | None = None) -> Tensor:
    """kappa(W) = sigma_max / sigma_min, computed in float64.

    Args:
        W: matrices, shape (..., D, k).
        rank: how many of the singular values count, where the remaining ones are zero by construction; by default
            all min(D, k).

    Returns:
        float64, shape (...). Infinite where sigma_min is zero (a singular or zero matrix).
    """
    sigma = torch.linalg.svdvals(W.detach().double())[..., :rank]
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


def identity_correction(W: Tensor, lam: float | Tensor) -> Tensor:
    """The cheap correction C = lam I_{D x k} (Theorem 3.8): no SVD, nothing to store.

    For lam > sigma_max(W), kappa(W + C) <= (lam + sigma_max) / (lam - sigma_max). A lam at or below sigma_max can
    make the condition number worse.

    The full form takes all heads' projection as one matrix, so that each head gets its own rows of the identity. The
    per-head form gives every head the same rectangular identity: pass the heads as a leading dimension.

    Args:
        W: matrices, shape (..., D, k). As the correction of W^T is that of W transposed, it does not matter whether
            they multiply tokens from the right, as in the paper, or are stored as torch's Linear stores them.
        lam: lambda of the paper, whose experiments use 10; or one for each matrix, of a shape that broadcasts
            against (...).

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    lam = torch.as_tensor(lam, dtype=W.dtype, device=W.device)
    return (lam[..., None, None] * torch.eye(*W.shape[-2:], dtype=W.dtype, device=W.device)).expand_as(W)


class Correction(nn.Module):
    """W -> W + C for a weight that stacks several projections, with C fixed when this module is made.

    The state dict says which conditioning it belongs to: the identity form keeps ``lam`` (a scalar, or one per head
    in the per-head form), the exact form the matrix ``C``, which training has long made impossible to recompute from
    W. Neither is a parameter, and neither loses precision when the model is cast to another dtype.

    Args:
        weight: the stacked projections, shape (blocks * D, k), for instance XCiT's qkv with three blocks.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5).
        lam: lambda of the identity form; 10 if not given, as in the paper.
        per_head: correct each head's D / heads rows as a matrix of their own, not each projection as a whole.
        blocks: how many projections are stacked along the first dimension; each is corrected by itself.
        heads: the attention's heads, for the per-head form.
        stack: where the projections are in ``weight``, if not one below the other; in the place of blocks and heads.

    Raises:
        ValueError: on an unknown type, a ``lam`` that is not positive, one given to the 'svd' form, or rows that
            blocks and heads do not divide.
    """

    def __init__(
        self,
        weight: Tensor,
        type: str = 'identity',
        lam: float | None = None,
        per_head: bool = False,
        blocks: int = 3,
        heads: int = 1,
        stack: Stack | None = None,
    ) -> None:
        super().__init__()
        self.stack = stack
        if stack is not None:
            weight, blocks, heads = stack.take(weight), len(stack.roles), stack.heads or 1
        self.split = (blocks, heads, -1) if per_head else (blocks, -1)
        if len(weight) % (blocks * heads if per_head else blocks):
            raise ValueError(
                f'conditioning: {len(weight)} rows are not {blocks} projections'
                + (f' of {heads} heads each' if per_head else '')
            )
        if type == 'identity':
            lam = 10.0 if lam is None else float(lam)
            if not 0 < lam < float('inf'):
                raise ValueError(f'conditioning: lam must be positive and finite, got {lam}')
            self.register_buffer('lam', torch.full((heads,) if per_head else (), lam, device=weight.device))
        elif type == 'svd':
            if lam is not None:
                raise ValueError("conditioning: 'svd' takes its scale from W and has no lam")
            C = svd_correction(weight.unflatten(0, self.split)).reshape(weight.shape)
            self.register_buffer('C', C)
        else:
            raise ValueError(f"conditioning: type must be 'identity' or 'svd', got {type!r}")

    def forward(self, W: Tensor) -> Tensor:
        """W + C, in the shape of W."""
        if self.stack is not None:
            return W + self.correction(W)
        return (W.unflatten(0, self.split) + self._blocks(W)).flatten(0, -2)

    def correction(self, W: Tensor) -> Tensor:
        """C, in the shape of W, its dtype and on its device, of which the identity form takes no more."""
        if self.stack is not None:
            return self.stack.put(self._blocks(self.stack.take(W)).flatten(0, -2), W)
        return self._blocks(W).flatten(0, -2)

    def _blocks(self, W: Tensor) -> Tensor:
        # Of the identity form one block is kept in memory, however many there are.
        if 'C' in self._buffers:
            return self.C.to(W.dtype).unflatten(0, self.split)
        return identity_correction(W.detach().unflatten(0, self.split), self.lam)

    def _apply(self, fn, recurse: bool = True) -> Correction:
        # A lam of 0.1 that has been through float16 is another lam, and a C that has been through it another C.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if torch.promote_types(old.dtype, new.dtype) != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self


_RECORD = re.compile(r'(^|\.)(correction|parametrizations\.\w+\.\d+)\.(lam|C)$')


def describe_conditioning(state_dict: dict[str, Tensor]) -> str:
    """Say in words which conditioning the weights in a state dict were made with, in the form configs use."""
    described = set()
    for key, value in state_dict.items():
        record = _RECORD.search(key)
        if record and record[3] == 'lam':
            per_head = ', per_head=True' if value.ndim else ''
            lam = f'{value.flatten()[0].item():g}' if value.numel() else 'nothing'
            described.add(f"dict(type='identity', lam={lam}{per_head})")
        elif record:
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
            'configured conditioning; spec-mmdet convert --condition takes plain ones over.'
        )
