"""Hooks that check a run's schedule, limit its history and record condition numbers during training."""

from __future__ import annotations

import copy
import csv
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import length_hint
from pathlib import Path
from statistics import median

import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim.scheduler.param_scheduler import (
    ConstantParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
)
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from ..compat import get_built_loops, get_load_path, is_resuming
from ..conditioning import Report, measure
from ..errors import InputError
from ..models.classifier import SpecXCiTClassifier
from ..models.jacobians import compute_jacobian_spectra
from ..models.xcit import SpecXCiT
from .saving import unwrap_model

MMENGINES_LIMIT = 1_000_000  # values in a history
LITTLE_DATA = 10_000  # images; with fewer, detectors have rarely been trained from random weights


@HOOKS.register_module()
class ScheduleGuard(Hook):
    """Hook that warns about a schedule that does not fit the data, and about few images with random weights."""

    def before_train(self, runner: Runner) -> None:
        """Compare the schedule with the number of iterations, and the number of images with the initial weights.

        Raises:
            InputError: if a part of the backbone is frozen with random weights.
        """
        advice = 'Set begin and end in param_scheduler with --cfg-options'
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            advice = 'Use --epochs N to rescale the schedule, or train --preset finetune for pretrained weights'
        for doubt in check_schedule(runner):
            runner.logger.warning(f'{doubt}. {advice}')
        backbone = getattr(unwrap_model(runner), 'backbone', None)
        is_exempt = not isinstance(backbone, SpecXCiT) or isinstance(backbone, SpecXCiTClassifier)
        if is_exempt or has_trained_weights(runner):
            return
        if backbone.frozen_stages >= 0:
            raise InputError(
                f'frozen_stages={backbone.frozen_stages} would freeze random weights of the backbone. '
                f'{describe_pretrained_weights(runner.cfg.model.backbone)}. Or train all stages: '
                '--cfg-options model.backbone.frozen_stages=-1'
            )
        images = len(runner.train_dataloader.dataset)
        if images < LITTLE_DATA:
            runner.logger.warning(f'the backbone starts from random weights, and {images} images are few for that. '
                                  f'{describe_pretrained_weights(runner.cfg.model.backbone)}')  # fmt: skip


def has_trained_weights(runner: Runner) -> bool:
    """Return whether a training starts from the weights of a file, of the backbone or of the detector."""
    backbone = getattr(unwrap_model(runner), 'backbone', None)
    return bool(getattr(backbone, 'init_cfg', None) or get_load_path(runner) or is_resuming(runner))


def summarise_schedule(runner: Runner) -> tuple[int, list[int]]:
    """Return the number of warm-up iterations of a runner, and the iterations at which the learning rate drops."""
    epoch = len(runner.train_dataloader)
    found = runner.param_schedulers or []
    found = [s for group in found.values() for s in group] if isinstance(found, dict) else found
    warm_up, drops = 0, []
    for scheduler in found:
        unit = epoch if scheduler.by_epoch else 1
        if isinstance(scheduler, LinearParamScheduler | ConstantParamScheduler) and scheduler.begin == 0:
            warm_up = max(warm_up, scheduler.end * unit)
        if isinstance(scheduler, MultiStepParamScheduler):
            drops += [step * unit for step in scheduler.milestones]
    return warm_up, drops


def find_learning_rate(runner: Runner) -> float:
    """Return the current learning rate, the highest of all groups of parameters."""
    return max(rate for rates in runner.optim_wrapper.get_lr().values() for rate in rates)


def check_schedule(runner: Runner) -> list[str]:
    """List the faults of a runner's schedule for its number of iterations."""
    total = runner.train_loop.max_iters
    warm_up, drops = summarise_schedule(runner)
    doubts = []
    if warm_up > total:
        doubts.append(f'the warm-up takes {warm_up} iterations and training {total}, so the learning rate stays low')
    elif drops and warm_up > min(drops):
        doubts.append(f'the learning rate drops at iteration {min(drops)}, before its warm-up ends at {warm_up}')
    if drops and max(drops) >= total:
        doubts.append(f'the learning rate drops at iteration {max(drops)}, but training ends at {total}')
    for hook in runner.hooks:
        momentum = hook.ema_cfg.get('momentum', 0.0002) if isinstance(hook, EMAHook) else 1
        if 2 / momentum > total:
            doubts.append(f'the moving average of the weights spans {1 / momentum:.0f} of {total} iterations: '
                          f'set its momentum to about {min(1, 10 / total):.2g}')  # fmt: skip
    return doubts


def describe_pretrained_weights(backbone: dict) -> str:
    """Return the advice to use published weights for a backbone, given its config; nothing is downloaded."""
    name = f'xcit_{backbone.get("arch", "small_12")}_p{backbone.get("patch_size", 16)}'
    advice = 'Use pretrained weights: --cfg-options model.backbone.init_cfg.type=Pretrained '
    advice += 'model.backbone.init_cfg.checkpoint=FILE'
    if backbone.get('conditioning'):
        advice += ', where FILE is the output of spec-mmdet convert SOURCE FILE --condition ...'
    if isinstance(backbone.get('arch', ''), str):
        advice += f" (published by XCiT's authors and timm as {name}_224 and so on: see docs/guide/checkpoints.md)"
    return advice


@HOOKS.register_module()
class HistoryLimit(Hook):
    """Hook that limits the history of logged scalars, which MMEngine copies at every update and stores in checkpoints.

    The logged numbers do not change: each history is as long as the longest window of the log processor, and complete
    where that computes a statistic of all iterations (``window_size='global'``).
    """

    def before_train(self, runner: Runner) -> None:
        """Find the longest window, which for times of a validation is all of it."""
        windows = [(entry['data_src'], entry.get('window_size')) for entry in runner.log_processor.custom_cfg]
        self.complete = {name for name, size in windows if size in (None, 'global')}
        by_epoch = any(size == 'epoch' for _, size in windows)
        loops = [loop for loop in get_built_loops(runner) if by_epoch or loop is not runner.train_loop]
        lengths = [length_hint(loop.dataloader, MMENGINES_LIMIT) for loop in loops]
        sizes = [size for _, size in windows if isinstance(size, int)]
        self.length = max([runner.log_processor.window_size, *lengths, *sizes])

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Set the limit of all histories; MMEngine creates one when a scalar is first logged."""
        for name, history in runner.message_hub.log_scalars.items():
            if not self.complete & {name, name.partition('/')[2]}:
                history.max_length = self.length


CONDITIONING = 'conditioning'  # prefix of the curves, and name of the table
MEDIANS = ('kappa_Q', 'kappa_K', 'kappa_V', 'kappa_J', 'sigma_min')
VALUES = ('sigma_min', 'sigma_max', 'kappa', 'conditioned_sigma_min', 'conditioned_sigma_max', 'conditioned_kappa')
COLUMNS = ('iter', 'layer', 'matrix', *VALUES)


@HOOKS.register_module()
class ConditioningHook(Hook):
    """Hook that records singular values and condition numbers at the first, the last and every n-th iteration.

    ``conditioning.csv`` in the work directory gets sigma_min, sigma_max and kappa of every projection of the backbone,
    without and with its correction, and of each layer's Jacobian on the first image of the batch (see
    :func:`compute_jacobian_spectra`). MMEngine's visualiser gets :data:`MEDIANS` over the layers, with corrections if
    there are any, and the seconds of the record. In distributed training, a process in the background computes the
    record. An error is logged once as a warning, and training continues.

    Args:
        interval: iterations between records. The default costs less than 1 % of the training time.
        heads: number of heads of each layer to use for the Jacobian.
    """

    def __init__(self, interval: int = 5000, heads: int = 1) -> None:
        self.interval = interval
        self.heads = heads

    def before_train(self, runner: Runner) -> None:
        """Warn if the corrections do not improve the condition numbers of random weights; create the table."""
        self.table, self.failed, self.pending = Path(runner.work_dir, f'{CONDITIONING}.csv'), False, None
        if is_main_process():
            with self._continue_on_error(runner):
                if not (is_resuming(runner) and self.table.exists()):
                    self.table.write_text(','.join(COLUMNS) + '\n')
                # Of trained weights, or those of convert --condition, W alone has no meaning.
                backbone = unwrap_model(runner).backbone
                if not has_trained_weights(runner) and (worsened := measure_backbone(backbone).describe_worsened()):
                    runner.logger.warning(worsened)

    @contextmanager
    def _continue_on_error(self, runner: Runner) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self.failed:
                reason = f'{type(error).__name__}: {error}'.partition('\n')[0]
                runner.logger.warning(f'condition numbers not recorded, training continues ({reason})')
            self.failed = True

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Record the condition numbers if they are due."""
        if not is_main_process():
            return
        due = not runner.iter or self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner)
        with self._continue_on_error(runner):
            if self.pending and (due or self.pending.poll()):
                self._write(runner)
            if due:
                model = unwrap_model(runner)
                image = model.data_preprocessor(dict(inputs=data_batch['inputs'][:1], data_samples=None))['inputs']
                job = runner.iter + 1, model.backbone, image, self.heads
                if get_world_size() == 1:
                    self._save(runner, *compute_rows(*job))
                else:
                    self._start(*job)

    def after_train(self, runner: Runner) -> None:
        """Wait for the last record."""
        with self._continue_on_error(runner):
            if self.pending:
                self._write(runner)

    def _start(self, iteration: int, backbone: nn.Module, image: Tensor, heads: int) -> None:
        # In a separate process, because for a large backbone the other training processes would time out.
        context = get_context('spawn')
        self.pending, pipe = context.Pipe(duplex=False)
        job = pipe, iteration, copy.deepcopy(backbone).cpu(), image.cpu(), heads
        context.Process(target=send_rows, args=job, daemon=True).start()
        pipe.close()

    def _write(self, runner: Runner) -> None:
        pending, self.pending = self.pending, None
        self._save(runner, *pending.recv())

    def _save(self, runner: Runner, rows: list[tuple], seconds: float) -> None:
        with self.table.open('a', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows(rows)
        medians = {f'{CONDITIONING}/{name}': value for name, value in compute_medians(rows).items()}
        runner.visualizer.add_scalars({**medians, f'{CONDITIONING}/seconds': seconds}, step=rows[0][0])


def measure_backbone(backbone: nn.Module) -> Report:
    """Measure a backbone's projections; rows of unknown attention are identified on a random image."""
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return measure(backbone, example=image.to(next(backbone.parameters(), image)))


def compute_rows(iteration: int, backbone: nn.Module, image: Tensor, heads: int) -> tuple[list[tuple], float]:
    """Compute the rows of ConditioningHook's table on an image, shape (1, 3, H, W), and the time in seconds."""
    start = time.perf_counter()
    spectra = [*measure_backbone(backbone), *compute_jacobian_spectra(backbone, image, heads)]
    rows = [
        (iteration, row.name, getattr(row, 'role', 'J'), *(getattr(row, name, None) for name in VALUES))
        for row in spectra
    ]
    return rows, time.perf_counter() - start


def send_rows(pipe: Connection, *job: object) -> None:
    """Run :func:`compute_rows` in a separate process, and send the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process, too
    pipe.send(compute_rows(*job))


def compute_medians(rows: Sequence[tuple]) -> dict[str, float]:
    """Compute the :data:`MEDIANS` of rows of ConditioningHook's table, of corrected matrices if there are any."""
    values: dict[str, list[float]] = {}
    for _, _, matrix, sigma_min, _, kappa, conditioned_sigma_min, _, conditioned_kappa in rows:
        corrected = conditioned_kappa is not None
        values.setdefault(f'kappa_{matrix[0]}', []).append(conditioned_kappa if corrected else kappa)
        if matrix != 'J':
            values.setdefault('sigma_min', []).append(conditioned_sigma_min if corrected else sigma_min)
    return {name: median(values[name]) for name in MEDIANS if name in values}
