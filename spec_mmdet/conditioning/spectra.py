"""Singular values and condition numbers of the projections, without and with their corrections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from .correction import Correction
from .effects import count_effective_keys, normalises_queries
from .finding.projections import Projection, find_projections
from .fixed import Corrections


@dataclass(frozen=True)
class Spectrum:
    """Extreme singular values of one projection, without and with its correction.

    The matrix is a projection of all heads with the role 'Q', 'K' or 'V'; in the per-head form the rows of one head,
    with a role like 'Q0'.
    """

    name: str
    role: str
    shape: tuple[int, int]
    sigma_min: float
    sigma_max: float
    conditioned_sigma_min: float | None
    conditioned_sigma_max: float | None

    @property
    def kappa(self) -> float:
        """kappa(W)."""
        return self.sigma_max / self.sigma_min if self.sigma_min else float('inf')

    @property
    def conditioned_kappa(self) -> float | None:
        """kappa(W + C)."""
        least, greatest = self.conditioned_sigma_min, self.conditioned_sigma_max
        return None if least is None else greatest / least if least else float('inf')


def compute_singular_values(M: Tensor) -> Tensor:
    """Return the singular values of matrices (... x m x n), or NaN where LAPACK's iteration does not converge."""
    M = M.cpu().double()  # not every accelerator has float64
    try:
        return torch.linalg.svdvals(M)
    except torch.linalg.LinAlgError:
        return M.new_full((*M.shape[:-2], min(M.shape[-2:])), float('nan'))


class Report(Sequence[Spectrum]):
    """Spectra of a model's projections, printed as notes and a table; computed at the first access.

    Args:
        found: the projections.
        corrections: the corrections that :func:`~.surgery.condition` has added to the weights, and their method
            keep_fixed for training.
        by_head: treat the rows of each head as a separate matrix, as is always done in the per-head form.

    Attributes:
        notes: warnings and remarks, a line each.
        left_out: attention that was left unconditioned, with the reason.
    """

    def __init__(self, found: Sequence[Projection], corrections: Corrections | None = None, by_head: bool = False):
        self._found = found
        self._by_head = by_head
        self.corrections = Corrections() if corrections is None else corrections
        self.notes: list[str] = []
        self.left_out: dict[str, str] = {}

    @cached_property
    def _rows(self) -> list[Spectrum]:
        return [row for projection in self._found for row in self._spectra(projection)]

    def _pair(self, projection: Projection) -> tuple[Correction | None, Tensor, Tensor | None]:
        """Return the correction, W and W + C of a projection."""
        if projection.name not in self.corrections:
            return projection.correction, projection.W, projection.W_plus_C
        corrected, W_plus_C = self.corrections[projection.name], projection.W
        return corrected.correction, W_plus_C - projection.rows.take(corrected.C).view_as(W_plus_C), W_plus_C

    def _spectra(self, projection: Projection) -> Iterator[Spectrum]:
        correction, W, W_plus_C = self._pair(projection)
        roles, name = list(projection.roles), projection.name
        if self._by_head or (correction is not None and correction.per_head):
            heads = projection.heads
            roles = [f'{role}{head}' for role in roles for head in range(heads)]
            W, W_plus_C = (None if M is None else M.unflatten(1, (heads, -1)).flatten(0, 1) for M in (W, W_plus_C))
        sigma = compute_singular_values(W)
        conditioned = [None] * len(sigma) if W_plus_C is None else compute_singular_values(W_plus_C)
        for role, *sigmas in zip(roles, sigma, conditioned):
            extremes = [None if values is None else values[i].item() for values in sigmas for i in (-1, 0)]
            yield Spectrum(name, role, tuple(W.shape[1:]), *extremes)

    def __getitem__(self, index: int | slice) -> Spectrum | list[Spectrum]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self] + [10])
        lines = [*self.notes, *filter(None, [self.describe_saturation()])]
        lines += [f'{"projection":{width}}    {"sigma_min":>10}{"sigma_max":>10}{"kappa(W)":>10}{"kappa(W+C)":>12}']
        for row in self:
            after = '-' if row.conditioned_kappa is None else f'{row.conditioned_kappa:.4g}'
            values = f'{row.sigma_min:>10.3g}{row.sigma_max:>10.3g}{row.kappa:>10.4g}{after:>12}'
            lines.append(f'{row.name:{width}} {row.role:3}{values}')
        if self.left_out:
            lines += ['left out:', *(f'{name}: {why}' for name, why in self.left_out.items())]
        return '\n'.join(lines)

    def describe_worsened(self) -> str:
        """Describe the corrections that do not improve the condition number, with numbers; '' if all do."""
        worse = [row for row in self if row.conditioned_kappa is not None and not row.conditioned_kappa < row.kappa]
        if not worse:
            return ''
        worst = max(worse, key=lambda row: row.conditioned_kappa / row.kappa if row.kappa < float('inf') else 0)
        return (
            f'the correction does not improve the condition number of {len(worse)} of {len(self)} projections; for '
            f'instance {worst.name} {worst.role}: kappa {worst.kappa:.4g} -> {worst.conditioned_kappa:.4g}, with '
            f'sigma_max {worst.sigma_max:.3g}. Use a lambda well above sigma_max'
        )

    def count_effective_keys(self, tokens: int = 197) -> list[tuple[float, float | None]]:
        """Numbers of keys, of ``tokens``, that a query attends to in each layer of softmax attention: with C, without.

        See :func:`~.effects.count_effective_keys`. Attention that normalises queries and keys is left out.
        """
        layers: dict[nn.Module, dict[str, tuple[Tensor, Tensor | None]]] = {}
        heads: dict[nn.Module, int | None] = {}
        for projection in self._found:
            if not normalises_queries(projection.attention):
                _, W, W_plus_C = self._pair(projection)
                pairs = zip(W, [None] * len(W)) if W_plus_C is None else zip(W_plus_C, W)
                layers.setdefault(projection.attention, {}).update(zip(projection.roles, pairs))
                if 'Q' in projection.roles:
                    heads[projection.attention] = projection.heads
        return [
            tuple(Q if Q is None else count_effective_keys(Q, K, h, tokens) for Q, K in zip(of['Q'], of['K']))
            for attention, of in layers.items()
            if 'K' in of
            and (h := heads.get(attention))
            # or something else than Q K^T comes first
            and len(of['K'][0]) % (len(of['Q'][0]) // h) == 0
        ]

    def describe_saturation(self, tokens: int = 197) -> str:
        """Describe how many keys a query attends to in conditioned softmax attention; '' without conditioned layers."""
        left = [pair for pair in self.count_effective_keys(tokens) if self._by_head or pair[1] is not None]
        if not left:
            return ''
        after, before = (median(column) if None not in column else None for column in zip(*left))
        return (
            f'softmax attention: a query attends to {after:.3g} of {tokens} keys'
            + ('' if before is None else f', without C to {before:.3g}')
            + f'. This is exp of the entropy for independent normalised tokens, the median of {len(left)} layers'
            + ('. Near 1, hardly any gradient reaches Q and K' if after < 2 else '')
        )


def measure(model: nn.Module, layout: dict[str, str] | None = None, example: object = None) -> Report:
    """Measure singular values and condition numbers of every query, key and value projection of a model.

    A projection is measured as one matrix of all heads, because the rows of a single head are well conditioned from
    the start; in the per-head form it is measured head by head.

    Args:
        model: any model whose attention :func:`find_projections` finds. If :func:`~.surgery.condition` has conditioned
            it, its weights are W + C; the report that condition returned has W and C separately.
        layout, example: as for :func:`~.surgery.condition`.
    """
    return Report(list(find_projections(model, layout, example)))
