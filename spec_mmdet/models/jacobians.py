"""Compute extreme singular values of the Jacobians of a backbone's attention on an image."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conditioning import find_projections
from ..conditioning.jacobian import compute_xca_singular_values
from .attention import XCA


@dataclass(frozen=True)
class JacobianSpectrum:
    """Extreme singular values of a layer's Jacobian with respect to its query, key and value projections.

    A head does not depend on other heads' projections, so they are exact if ``heads`` contains all heads.
    """

    name: str
    heads: tuple[int, ...]
    num_heads: int
    sigma_min: float
    sigma_max: float

    @property
    def kappa(self) -> float:
        """The condition number."""
        return self.sigma_max / self.sigma_min if self.sigma_min else float('inf')


@torch.no_grad()
def compute_jacobian_spectra(model: nn.Module, image: Tensor, heads: int | None = None) -> list[JacobianSpectrum]:
    """Compute the Jacobian spectrum of every XCA layer in a model, its correction included, on one image.

    Args:
        model: a backbone; a copy is run on the CPU, in float64 and evaluation mode.
        image: the backbone's input, shape (1, 3, H, W).
        heads: number of heads per layer. By default all if they have at most 32 channels (hundredths of a second
            each), otherwise one (about a second).
    """
    model = copy.deepcopy(model).cpu().double()
    model.eval()
    tokens = {}
    for name, module in model.named_modules():
        if isinstance(module, XCA):
            module.register_forward_pre_hook(lambda module, args, name=name: tokens.update({name: args[0][0]}))
    model(image.cpu().double())
    spectra = []
    for name, X in tokens.items():
        attention = model.get_submodule(name)
        (qkv,) = find_projections(attention)
        W = qkv.W if qkv.correction is None else qkv.W_plus_C
        # The bias becomes one more row of the projection, and each token gets a last entry of 1.
        W = torch.cat([W, attention.qkv.bias.view(3, -1, 1)], dim=2).unflatten(1, (attention.num_heads, -1))
        X = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
        number = attention.num_heads
        wanted = min(heads or (number if W.shape[2] <= 32 else 1), number)
        chosen = tuple(i * number // wanted for i in range(wanted))
        temperatures = attention.temperature.flatten()
        sigma = [compute_xca_singular_values(X, *W[:, head].mT, temperatures[head]) for head in chosen]
        extremes = min(low for low, _ in sigma), max(high for _, high in sigma)
        spectra.append(JacobianSpectrum(name, chosen, number, *extremes))
    return spectra
