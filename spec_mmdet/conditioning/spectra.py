"""Singular values and condition numbers of the projections, without and with their corrections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .projections import Projection, projections


@dataclass(frozen=True)
class Spectrum:
    """The extreme singular values of one corrected matrix, without and with its correction.

    The matrix is a projection as a whole, all heads together, with the role 'Q', 'K' or 'V'; in the per-head form one
    head's rows of it, with a role like 'Q0'.
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
        if self.conditioned_sigma_min is None:
            return None
        return self.conditioned_sigma_max / self.conditioned_sigma_min if self.conditioned_sigma_min else float('inf')


class Report(list[Spectrum]):
    """The spectra of a model's projections; printed, a table.

    Attributes:
        left_out: what looks like attention and was not taken, and why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, str] = {}

    def __str__(self) -> str:
        width = max([len(row.name) for row in self] + [10])
        lines = [f'{"projection":{width}}    {"sigma_min":>10}{"sigma_max":>10}{"kappa(W)":>10}{"kappa(W+C)":>12}']
        for row in self:
            after = '-' if row.conditioned_kappa is None else f'{row.conditioned_kappa:.4g}'
            figures = f'{row.sigma_min:>10.3g}{row.sigma_max:>10.3g}{row.kappa:>10.4g}{after:>12}'
            lines.append(f'{row.name:{width}} {row.role:3}{figures}')
        if self.left_out:
            lines += ['left out:', *(f'{name}: {why}' for name, why in self.left_out.items())]
        return '\n'.join(lines)

    def unhelpful(self) -> str:
        """Say in words which corrections do not improve the condition number, with the numbers; '' if all do."""
        worse = [row for row in self if row.conditioned_kappa is not None and not row.conditioned_kappa < row.kappa]
        if not worse:
            return ''
        worst = max(worse, key=lambda row: row.conditioned_kappa / row.kappa if row.kappa < float('inf') else 0)
        return (
            f'the correction does not improve the condition number of {len(worse)} of {len(self)} projections; for '
            f'instance {worst.name} {worst.role}: kappa {worst.kappa:.4g} -> {worst.conditioned_kappa:.4g}, with '
            f'sigma_max {worst.sigma_max:.3g}. lam should be well above sigma_max'
        )


def spectra(found: list[Projection]) -> Report:
    report = Report()
    for projection in found:
        W, W_plus_C, roles = projection.W, projection.W_plus_C, list(projection.roles)
        if W_plus_C is not None and len(projection.correction.split) == 3:  # the per-head form
            heads = projection.correction.split[1]
            roles = [f'{role}{head}' for role in roles for head in range(heads)]
            W, W_plus_C = (stack.unflatten(1, (heads, -1)).flatten(0, 1) for stack in (W, W_plus_C))
        # Not every accelerator has float64, and to none are a few small matrices worth its while.
        sigma = torch.linalg.svdvals(W.cpu().double())
        conditioned = [None] * len(sigma) if W_plus_C is None else torch.linalg.svdvals(W_plus_C.cpu().double())
        for role, before, after in zip(roles, sigma, conditioned):
            extremes = (None, None) if after is None else (after[-1].item(), after[0].item())
            report.append(
                Spectrum(projection.name, role, tuple(W.shape[1:]), before[-1].item(), before[0].item(), *extremes)
            )
    return report


def measure(model: nn.Module) -> Report:
    """The extreme singular values and condition numbers of every query, key and value projection of a model.

    Each projection is taken as a whole, all heads together, for a single head's rows are well conditioned from the
    start; only where the per-head form corrects it, head by head.

    Args:
        model: any model whose attention :func:`projections` finds, conditioned or not.
    """
    return spectra(list(projections(model)))
