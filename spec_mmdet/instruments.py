"""Seeing the conditioning work: the Jacobians of a backbone's attention, and a hook that follows them in training."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from .attention import XCA
from .conditioning import measure, projections
from .jacobian import xca_singular_values


@dataclass(frozen=True)
class JacobianSpectrum:
    """The extreme singular values of one attention layer's Jacobian by its query, key and value projections.

    Heads do not depend on each other's projections, so the layer's are the extremes over its heads: exact where
    ``heads`` are all of them, and where they are a sample, those of the sample.
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


def _choose_heads(num_heads: int, head_dim: int, wanted: int | None) -> tuple[int, ...]:
    if wanted is None:
        wanted = num_heads if head_dim <= 32 else 1
    wanted = min(wanted, num_heads)
    return tuple(i * num_heads // wanted for i in range(wanted))


@torch.no_grad()
def jacobian_spectra(model: nn.Module, image: Tensor, heads: int | None = None) -> list[JacobianSpectrum]:
    """The Jacobian of every XCA layer in a model, with the correction it has, on one image.

    Args:
        model: a backbone; a copy is run on the CPU, in float64 and evaluation mode.
        image: as the backbone takes it, shape (1, 3, H, W).
        heads: how many heads of each layer to take. By default all, if they are at most 32 channels wide, which take
            hundredths of a second each, or else one, which takes about a second.

    Returns:
        One spectrum a layer, in the order of the model; none for layers of other kinds.
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
        (qkv,) = projections(attention)
        W = qkv.W if qkv.correction is None else qkv.W_plus_C
        # The bias is one more row of the projection, for tokens with a last entry of one.
        W = torch.cat([W, attention.qkv.bias.view(3, -1, 1)], dim=2).unflatten(1, (attention.num_heads, -1))
        X = torch.cat([X, X.new_ones(len(X), 1)], dim=1)
        chosen = _choose_heads(attention.num_heads, W.shape[2], heads)
        sigma = [xca_singular_values(X, *W[:, head].mT, attention.temperature[head].squeeze()) for head in chosen]
        extremes = min(low for low, _ in sigma), max(high for _, high in sigma)
        spectra.append(JacobianSpectrum(name, chosen, attention.num_heads, *extremes))
    return spectra


@HOOKS.register_module()
class ConditioningHook(Hook):
    """Follow the conditioning in training: singular values and condition numbers, to MMEngine's visualiser.

    Written under 'conditioning/' at the first iteration and every ``interval`` ones: sigma_min, sigma_max and kappa of
    every projection of the backbone, without and with its correction, and of each layer's Jacobian on the first image
    of the batch (see :func:`jacobian_spectra`); and how many seconds that took.

    Args:
        interval: iterations from one record to the next. The default keeps the cost under 1 % of the training time.
        heads: how many heads of each layer to take for the Jacobian; by default one.
    """

    def __init__(self, interval: int = 5000, heads: int = 1) -> None:
        self.interval = interval
        self.heads = heads

    def before_train(self, runner: Runner) -> None:
        """Say so if the corrections do not improve the condition numbers."""
        unhelpful = measure(self._model(runner).backbone).unhelpful() if is_main_process() else ''
        if unhelpful:
            runner.logger.warning(unhelpful)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Write the figures, if they are due."""
        if runner.iter and not self.every_n_train_iters(runner, self.interval) or not is_main_process():
            return
        start = time.perf_counter()
        model = self._model(runner)
        image = model.data_preprocessor(dict(inputs=data_batch['inputs'][:1], data_samples=None))['inputs']
        figures = {}
        for row in measure(model.backbone):
            name = f'conditioning/{row.name}.{row.role}'
            figures |= {f'{name}/sigma_min': row.sigma_min, f'{name}/sigma_max': row.sigma_max}
            figures[f'{name}/kappa'] = row.kappa
            if row.conditioned_kappa is not None:
                figures[f'{name}/conditioned_sigma_min'] = row.conditioned_sigma_min
                figures[f'{name}/conditioned_sigma_max'] = row.conditioned_sigma_max
                figures[f'{name}/conditioned_kappa'] = row.conditioned_kappa
        for row in jacobian_spectra(model.backbone, image, self.heads):
            name = f'conditioning/{row.name}.J'
            figures |= {f'{name}/sigma_min': row.sigma_min, f'{name}/sigma_max': row.sigma_max}
            figures[f'{name}/kappa'] = row.kappa
        figures['conditioning/seconds'] = time.perf_counter() - start
        runner.visualizer.add_scalars(figures, step=runner.iter + 1)

    @staticmethod
    def _model(runner: Runner) -> nn.Module:
        return runner.model.module if is_model_wrapper(runner.model) else runner.model
