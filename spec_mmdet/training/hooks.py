"""What watches a run: that its checkpoint fits the model, and the condition numbers as training goes on."""

from __future__ import annotations

import time

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..checkpoints.reading import mismatches, state_dict_of
from ..conditioning import measure, require_same_conditioning
from ..errors import InputError, naming
from ..models.jacobians import jacobian_spectra


def unwrapped(runner: Runner) -> nn.Module:
    """The runner's model, without the wrapper of distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


@HOOKS.register_module()
class CheckpointGuard(Hook):
    """Stop when a checkpoint does not fit the model, where MMEngine would warn and go on with random weights.

    A test or a resumed training needs every weight. A new training that starts from a checkpoint (``load_from``)
    needs the backbone's; its heads may be made for other classes.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the runner's model.

        Raises:
            InputError: where they do not fit.
        """
        model = unwrapped(runner)
        name = f'checkpoint {runner._load_from}' if runner._load_from else 'checkpoint'
        weights = state_dict_of(checkpoint, name)
        with naming(name):
            require_same_conditioning(weights, model.state_dict())
        fine_tuning = runner._train_loop is not None and not isinstance(runner._train_loop, dict) and not runner._resume
        faults = mismatches(model, weights, part='backbone.' if fine_tuning else '')
        if faults:
            raise InputError(f'{name} does not fit the configured model: {faults}')


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
        unhelpful = measure(unwrapped(runner).backbone).unhelpful() if is_main_process() else ''
        if unhelpful:
            runner.logger.warning(unhelpful)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Write the figures, if they are due."""
        if runner.iter and not self.every_n_train_iters(runner, self.interval) or not is_main_process():
            return
        start = time.perf_counter()
        model = unwrapped(runner)
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
