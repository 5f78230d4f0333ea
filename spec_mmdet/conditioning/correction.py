"""The corrections (arXiv 2603.07162, Theorems 3.5 and 3.8), and their records in a state dict."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..errors import InputError
from .finding.rows import RowSelection


def compute_condition_number(W: Tensor, rank: int | None = None) -> Tensor:
    """Condition number kappa(W) = sigma_max / sigma_min, computed in float64.

    Args:
        W: matrices, shape (..., D, k).
        rank: how many of the singular values count, where the remaining ones are zero by construction; by default
            all min(D, k).

    Returns:
        float64, shape (...). Infinite where sigma_min is zero (a singular or zero matrix).
    """
    sigma = torch.linalg.svdvals(W.detach().double())[..., :rank]
    return torch.where(sigma[..., -1] > 0, sigma[..., 0] / sigma[..., -1], torch.inf)


def compute_sigma_max(W: Tensor) -> Tensor:
    """Largest singular values of matrices (..., D, k), in float64, on the CPU (or the meta device).

    They are square roots of eigenvalues of the smaller Gram matrix. Not every accelerator has float64.
    """
    W = W.detach() if W.is_meta else W.detach().cpu()
    W = W.double() if W.shape[-2] <= W.shape[-1] else W.double().mT
    return torch.linalg.eigvalsh(W @ W.mT)[..., -1].clamp_min(0).sqrt()


def compute_svd_correction(W: Tensor) -> Tensor:
    """Exact correction C = sigma_max U V^T for W = U S V^T (Theorem 3.5), so that kappa(W + C) <= 2.

    W + C = U (S + sigma_max I) V^T, hence kappa(W + C) = 2 sigma_max / (sigma_min + sigma_max). For a rectangular W,
    U V^T is the thin polar factor. ``W`` and C have the shape (..., D, k); C has no gradient.
    """
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return (S[..., :1, None] * (U @ Vh)).to(W)


def compute_identity_correction(W: Tensor, lam: float | Tensor) -> Tensor:
    """Identity correction C = lam I_{D x k} (Theorem 3.8): no SVD, nothing to store.

    For lam > sigma_max(W), kappa(W + C) <= (lam + sigma_max) / (lam - sigma_max). A lam at or below sigma_max can
    make the condition number worse. The full form treats the projection of all heads as one matrix, so that each head
    gets its own rows of the identity. For the per-head form, pass the heads as a leading dimension.

    Args:
        W: matrices, shape (..., D, k), in the paper's layout or in that of torch's Linear: C of W^T is C^T.
        lam: lambda of the paper, whose experiments use 10; or one for each matrix, of a shape that broadcasts
            against (...).

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    lam = torch.as_tensor(lam, dtype=W.dtype, device=W.device)
    return (lam[..., None, None] * torch.eye(*W.shape[-2:], dtype=W.dtype, device=W.device)).expand_as(W)


class Correction(nn.Module):
    """W -> W + C for a weight that stacks several projections, with C fixed when this module is made.

    The state dict records the conditioning. The identity form stores ``lam``: one number, or one per head in the
    per-head form. If lambda is relative to sigma_max, ``lam`` has one entry per corrected matrix, shape (blocks,) or
    (blocks, heads), and ``sigmas`` is stored with it. The exact form stores the matrix ``C``. Training changes W, so
    neither C nor a relative lambda can be recomputed later. None of them is a parameter, and none loses precision when
    the model is cast to another dtype.

    Args:
        weight: the stacked projections, shape (blocks * D, k), for instance XCiT's qkv with three blocks.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5).
        lam: lambda of the identity form, the same for all matrices; the paper's experiments use 10.
        sigmas: lambda of the identity form as a multiple of sigma_max of each corrected matrix, which bounds
            kappa(W + C) by (sigmas + 1) / (sigmas - 1) if it is above 1. The default, if ``lam`` is not given, is 2:
            kappa(W + C) <= 3.
        per_head: correct each head's D / heads rows as a separate matrix, not each projection as a whole.
        blocks: number of projections stacked along the first dimension; each is corrected separately.
        heads: number of attention heads, for the per-head form.
        rows: position of the projections in ``weight``, if they are not stacked one below the other; replaces
            ``blocks`` and ``heads``.

    Raises:
        ValueError: if ``type`` is unknown, ``lam`` or ``sigmas`` is not positive, both are given or one is given to the
            'svd' form, a projection is zero and lambda relative to it, or blocks and heads do not divide the rows.
    """

    def __init__(
        self,
        weight: Tensor,
        type: str = 'identity',
        lam: float | None = None,
        sigmas: float | None = None,
        per_head: bool = False,
        blocks: int = 3,
        heads: int = 1,
        rows: RowSelection | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        if rows is not None:
            weight, blocks, heads = rows.take(weight), len(rows.roles), rows.heads or 1
        self.per_head = per_head
        self.split = (blocks, heads, -1) if per_head else (blocks, -1)
        if len(weight) % (blocks * heads if per_head else blocks):
            by_head = f' of {heads} heads each' if per_head else ''
            raise ValueError(f'conditioning: {len(weight)} rows cannot be divided into {blocks} projections{by_head}')
        if type not in ('identity', 'svd'):
            raise ValueError(f"conditioning: type must be 'identity' or 'svd', got {type!r}")
        for name, value in (('lam', lam), ('sigmas', sigmas)):
            if value is not None and type == 'svd':
                raise ValueError(f"conditioning: {name} does not apply to 'svd', whose scale is sigma_max(W)")
            if value is not None and not 0 < value < float('inf'):
                raise ValueError(f'conditioning: {name} must be positive and finite, got {value}')
        matrices = weight.detach().unflatten(0, self.split)
        if type == 'svd':
            self.register_buffer('C', compute_svd_correction(matrices).reshape(weight.shape))
        elif lam is not None:
            if sigmas is not None:
                raise ValueError(f'conditioning: use lam={lam:g} or sigmas={sigmas:g}, not both')
            self.register_buffer('lam', torch.full((heads,) if per_head else (), float(lam), device=weight.device))
        else:
            sigmas = 2.0 if sigmas is None else float(sigmas)
            lam = sigmas * compute_sigma_max(matrices)
            if not weight.is_meta and not lam.all():
                raise ValueError('conditioning: sigma_max of a projection is 0; use lam= instead of sigmas=')
            self.register_buffer('lam', lam.float().to(weight.device))
            self.register_buffer('sigmas', torch.tensor(sigmas, device=weight.device))

    @classmethod
    def from_state(cls, weight: Tensor, state: dict[str, Tensor], blocks: int = 3) -> Correction:
        """Rebuild a correction from its own state dict, for a weight of ``blocks`` stacked projections."""
        per_head = 'lam' in state and state['lam'].ndim > ('sigmas' in state)
        heads = state['lam'].shape[-1] if per_head else 1
        correction = cls(weight, lam=1.0, per_head=per_head, blocks=blocks, heads=heads)
        del correction.lam
        for name, value in state.items():
            correction.register_buffer(name, value)
        return correction

    def forward(self, W: Tensor) -> Tensor:
        """W + C, in the shape of W."""
        if self.rows is not None:
            return W + self.make_C(W)
        return (W.unflatten(0, self.split) + self._make_blocks(W)).flatten(0, -2)

    def make_C(self, W: Tensor) -> Tensor:
        """C in the shape and dtype of W and on its device; the identity form uses nothing else of W."""
        if self.rows is not None:
            return self.rows.put(self._make_blocks(self.rows.take(W)).flatten(0, -2), W)
        return self._make_blocks(W).flatten(0, -2)

    def _make_blocks(self, W: Tensor) -> Tensor:
        if 'C' in self._buffers:
            return self.C.to(W.dtype).unflatten(0, self.split)
        return compute_identity_correction(W.detach().unflatten(0, self.split), self.lam)

    def _apply(self, fn, recurse: bool = True) -> Correction:
        # A cast to float16 and back would change lam = 0.1, and C.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if torch.promote_types(old.dtype, new.dtype) != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self


_RECORD = re.compile(r'(?:^|\.)(?:correction|parametrizations\.\w+\.\d+)\.(lam|C)$')


def describe_conditioning(state_dict: dict[str, Tensor]) -> str:
    """Description of the conditioning recorded in a state dict, in the form that configs use; 'None' without one."""
    described = set()
    for key, value in state_dict.items():
        record = _RECORD.search(key)
        if record and record[1] == 'lam':
            sigmas = state_dict.get(f'{key.removesuffix("lam")}sigmas')
            name, scale = ('lam', value) if sigmas is None else ('sigmas', sigmas)
            per_head = ', per_head=True' if value.ndim > (sigmas is not None) else ''
            number = f'{scale.flatten()[0].item():g}' if scale.numel() else 'nothing'
            described.add(f"dict(type='identity', {name}={number}{per_head})")
        elif record:
            described.add("dict(type='svd')")
    return ' and '.join(sorted(described)) or 'None'


def require_same_conditioning(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Raise an InputError for weights made with a conditioning different from the model's: W + C would not be theirs.

    Args:
        theirs: the state dict to be loaded. A relative lambda is loaded with it, as sigma_max of its initial weights.
        ours: the model's own.
    """
    made_with, configured = describe_conditioning(theirs), describe_conditioning(ours)
    if made_with != configured:
        raise InputError(
            f'the weights were made with conditioning={made_with}, but the backbone is configured with '
            f'conditioning={configured}. Set conditioning={made_with} in the config, or use weights made with the '
            'configured conditioning; "spec-mmdet convert --condition" converts plain weights.'
        )
