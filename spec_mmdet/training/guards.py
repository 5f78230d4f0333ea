"""Stop a run that cannot succeed: its checkpoint does not fit, its numbers are not finite, or it hangs."""

from __future__ import annotations

import ctypes
import os
import signal
from math import isfinite
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from mmdet.registry import HOOKS
from mmengine.dist import broadcast, get_rank
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoints.reading import describe_mismatches, get_state_dict
from ..checkpoints.writing import serialize
from ..compat import end_loader_workers, get_built_loops, get_load_path, is_resuming, is_training
from ..conditioning import require_same_conditioning
from ..errors import InputError, list_briefly, prefix_errors
from ..files import write
from .saving import describe_last_checkpoint, unwrap_model
from .schedule import apply_configured_schedule

NORM = 'train/grad_norm'  # where MMEngine logs it


@HOOKS.register_module()
class CheckpointGuard(Hook):
    """Hook that stops if a checkpoint does not fit the model; MMEngine would only warn and keep random weights.

    Tests and resumed trainings need all weights. A new training from a checkpoint (``load_from``) needs only those of
    the backbone, because its heads may have different classes. A plain state dict gets the key that EMAHook reads.
    """

    priority = 'VERY_HIGH'  # before hooks that load the weights, too

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the runner's model.

        Raises:
            InputError: if they do not fit.
        """
        # MMEngine would run the config as Python code when resuming.
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)
        model = unwrap_model(runner)
        name = f'checkpoint {get_load_path(runner)}' if get_load_path(runner) else 'checkpoint'
        weights = get_state_dict(checkpoint, name)
        with prefix_errors(name):
            require_same_conditioning(weights, model.state_dict())
        fine_tuning = is_training(runner) and not is_resuming(runner)
        faults = describe_mismatches(model, weights, part='backbone.' if fine_tuning else '')
        if faults:
            raise InputError(f'{name} does not fit the configured model: {faults}. Use the config of its training')
        if fine_tuning:
            own = model.state_dict()
            renewed = {k: own[k] for k, value in weights.items() if k in own and own[k].shape != value.shape}
            weights |= renewed
            if renewed:
                runner.logger.info(
                    f'{name}: {len(renewed)} tensors of the heads have other shapes, because its classes differ, and '
                    f'start from random values ({list_briefly(list(renewed))})'
                )
        checkpoint['state_dict'] = weights
        if is_training(runner) and is_resuming(runner):
            apply_configured_schedule(runner, checkpoint)


@HOOKS.register_module()
class FiniteGuard(Hook):
    """Hook that stops a training with a non-finite loss or gradient before a checkpoint is saved.

    With a loss scale (mixed precision), a step whose gradient overflows is skipped and the scale is reduced. Only
    ``patience`` such iterations in a row stop the training. They are excluded from the logged means, because JSON has
    no infinity.

    Args:
        patience: number of iterations.
    """

    priority = 'HIGHEST'  # before MMEngine copies the losses from the GPU one by one

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self.in_a_row = 0
        self.stepped = False

    def before_train(self, runner: Runner) -> None:
        """Register a hook for the optimiser's steps, which detects skipped ones."""
        if is_scaled(runner):
            runner.optim_wrapper.optimizer.register_step_post_hook(self._note_step)

    def _note_step(self, optimizer: torch.optim.Optimizer, *args) -> None:
        self.stepped = not getattr(optimizer, 'found_inf', False)  # a fused optimiser skips the step itself

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Check this iteration's losses and gradient; converts ``outputs`` to floats.

        Raises:
            InputError: if a number is not finite, with the images, the last good checkpoint and the file of the batch.
        """
        numbers = to_floats(outputs or {})
        if outputs:
            outputs.update(numbers)
        wrong = [f'{name} {value}' for name, value in numbers.items() if not isfinite(value)]
        scaled = is_scaled(runner)
        logged = runner.message_hub.log_scalars
        norm = logged.get(NORM)
        if scaled:
            if runner.optim_wrapper.should_update() and not self.stepped:
                wrong.append(f'the gradient, at a loss scale of {runner.optim_wrapper.loss_scaler.get_scale():g}')
            self.stepped = False
        elif norm is not None and not isfinite(norm.current()):
            wrong.append(f'the norm of the gradient {norm.current()}')
        if wrong:
            self.in_a_row += 1
        elif runner.optim_wrapper.should_update():
            self.in_a_row = 0
        if not wrong or (scaled and self.in_a_row < self.patience):
            for name in [name for name, value in numbers.items() if not isfinite(value)]:
                del outputs[name]
            if norm is not None and not isfinite(norm.current()):
                del logged[NORM]
                if len(norm.data[0]) > 1:
                    logged[NORM] = HistoryBuffer(*(column[:-1] for column in norm.data))
            return
        images = [Path(getattr(sample, 'img_path', '?')).name for sample in data_batch.get('data_samples', [])]
        dump = Path(runner.work_dir, f'not_finite_{runner.iter + 1}_{get_rank()}.pth')
        write(dump, serialize(dict(iter=runner.iter + 1, figures=numbers, images=images, inputs=data_batch['inputs'])))
        raise InputError(
            f'iteration {runner.iter + 1}: not finite: {list_briefly(wrong)}; images: {", ".join(images)}. Training '
            f'stopped; {describe_last_checkpoint(runner)}. The batch is in {dump}. {advise(runner)}'
        )


def is_scaled(runner: Runner) -> bool:
    """Return whether a runner trains in mixed precision with a loss scale."""
    optim = runner.optim_wrapper
    return isinstance(optim, AmpOptimWrapper) and optim.loss_scaler.is_enabled()


def advise(runner: Runner) -> str:
    """Return advice to keep a runner's numbers finite."""
    if not is_scaled(runner) or runner.optim_wrapper.cast_dtype == torch.bfloat16:
        return 'Try a lower learning rate or optim_wrapper.clip_grad'
    return (
        'float16 ends at 65504. Try --cfg-options optim_wrapper.dtype=bfloat16, leave out --amp, or reduce a fixed '
        'optim_wrapper.loss_scale'
    )


def to_floats(numbers: dict[str, Tensor | float]) -> dict[str, float]:
    """Convert losses to floats with a single copy from the GPU."""
    tensors = {name: value.detach().float().reshape(()) for name, value in numbers.items() if torch.is_tensor(value)}
    first = next(iter(tensors.values()), None)
    values = torch.stack([value.to(first.device) for value in tensors.values()]).tolist() if tensors else []
    return {**numbers, **dict(zip(tensors, values))}


def end_worker(error: Exception, content: object) -> None:
    """Exit a data-loader worker that cannot send a batch, for which training would wait (shared memory is full)."""
    os.write(2, f'a data-loader worker exits: {str(error).partition(chr(10))[0]}\n'.encode())
    os._exit(1)


class WorkerStart:
    """Start-up function of a data-loader worker: ignore SIGINT, end with the parent process, exit if sending fails."""

    def __init__(self, then: object) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        Queue._on_queue_feeder_error = staticmethod(end_worker)
        if os.name == 'posix' and os.uname().sysname == 'Linux':
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if self.then is not None:
            self.then(worker)


@HOOKS.register_module()
class BufferGuard(Hook):
    """Hook that makes all processes evaluate the buffers that the main process saves.

    Distributed training only averages gradients: BN's running statistics are those of each process's own images.
    MMEngine's SyncBuffersHook would average all buffers, and with three processes thereby round the fixed corrections.
    """

    priority = 'LOW'  # after EMAHook, which evaluates other weights

    def before_val_epoch(self, runner: Runner) -> None:
        """Send the main process's buffers to the others."""
        for buffer in unwrap_model(runner).buffers():
            broadcast(buffer)


@HOOKS.register_module()
class LoaderGuard(Hook):
    """Hook that ends data-loader workers with their parent process, and times out if one hangs.

    Args:
        timeout: seconds to wait for a batch before the run ends with an error.
    """

    def __init__(self, timeout: float = 600) -> None:
        self.timeout = timeout

    def before_run(self, runner: Runner) -> None:
        """Prepare the loaders of all loops."""
        for loader in find_loaders(runner):
            loader.worker_init_fn = WorkerStart(loader.worker_init_fn)
            loader.timeout = loader.timeout or self.timeout


def find_loaders(runner: Runner) -> list[DataLoader]:
    """List a runner's data loaders with workers."""
    loaders = (getattr(loop, 'dataloader', None) for loop in get_built_loops(runner))
    return [loader for loader in loaders if isinstance(loader, DataLoader) and loader.num_workers]


def end_workers(runner: Runner) -> None:
    """End the persistent workers of a runner's loaders; garbage collection would take 5 seconds for each."""
    for loader in find_loaders(runner):
        end_loader_workers(loader)
