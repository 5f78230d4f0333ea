"""Save checkpoints atomically, before old ones are removed, at the configured steps and on signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_reduce, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from ..checkpoints.reading import find_nonfinite, load
from ..checkpoints.writing import serialize
from ..compat import CheckpointSteps, is_resuming, is_training
from ..errors import InputError, list_briefly
from ..evaluation.tasks import PREFIXES
from ..files import write
from ..models.products import CHOSEN
from ..processes import start_max

CHOSEN_BY = 'best_chosen_by'  # key of the message hub: the metric that defines the best checkpoint
INTERRUPTED = 'interrupted.pth'  # the checkpoint saved on a signal
PROMPT = timedelta(minutes=10)  # timeout for agreeing on a signal
EVALUATED = 'last_evaluation'  # file with the last evaluated epoch (or iteration, without epochs)

_received: list[int] = []


def unwrap_model(runner: Runner) -> nn.Module:
    """Return the runner's model without the wrapper of distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Make SIGTERM and SIGINT save and stop after the iteration (the hook below does); a second signal exits at once.

    In a thread other than the main one, to which Python sends no signals, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if _received:
            os._exit(128 + number)
        _received.append(number)
        # print is not reentrant, and the signal may arrive during a print.
        says = f'{signal.Signals(number).name}: saving after this iteration; a second signal exits at once\n'
        os.write(2, says.encode())

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """MMEngine file backend that writes local files atomically."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        write(filepath, obj.encode(encoding))


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointSteps, CheckpointHook):
    """MMEngine's CheckpointHook that keeps an intact checkpoint at every moment.

    * Files are written atomically (by the file backend "atomic", unless ``backend_args`` is given), and old ones are
      removed afterwards. ``last_checkpoint`` contains a file name without folder, so a work directory can be moved.
    * Weights with NaN or inf are an error, and nothing is saved.
    * A checkpoint with an AP of 0 is never the best one.
    * ``best_..._weights.pth`` contains only the weights and classes of the best checkpoint.
    * For exact resuming, checkpoints also contain the iteration within the epoch, the settings of an optimiser
      step, the kernels of matrix products and accumulated gradients.
    * On a signal (:func:`stop_on_signals`), the hook saves ``interrupted.pth``, and the process exits with status 128 +
      signal number.
    """

    def __init__(self, *args, backend_args: dict | None = None, **kwargs) -> None:
        super().__init__(*args, backend_args=backend_args or dict(backend='atomic'), **kwargs)

    def before_train(self, runner: Runner) -> None:
        """Update the path of the best checkpoint, because the work directory may have been moved.

        A resumed training that chooses the best one by a different metric starts without one.
        """
        hub = runner.message_hub
        before = hub.runtime_info.get(CHOSEN_BY) if self.save_best else None
        if before and before != self._describe_choice():
            for name in [name for name in hub.runtime_info if name.startswith(('best_score', 'best_ckpt'))]:
                hub.pop_info(name)
            runner.logger.warning(
                f'the best checkpoint was chosen by {before} and is now by {self._describe_choice()}: it is kept, but '
                'the next ones are not compared with it'
            )
        super().before_train(runner)
        self.agreeing = None
        if getattr(self, 'best_ckpt_path', None):
            self.best_ckpt_path = self._here(self.best_ckpt_path)
        for key, path in getattr(self, 'best_ckpt_path_dict', {}).items():
            self.best_ckpt_path_dict[key] = path and self._here(path)

    def _describe_choice(self) -> str:
        """Return the metrics that define the best checkpoint, and whether greater or lower values are better."""
        return ', '.join(f'{key} ({rule})' for key, rule in zip(self.key_indicators, self.rules))

    def _here(self, path: str) -> str:
        return os.path.join(self.out_dir, os.path.basename(path))

    def _save(self, runner: Runner, name: str, meta: dict) -> None:
        """Write a checkpoint, then record it as the last one."""
        if not runner.optim_wrapper.should_update():
            average_gradients(unwrap_model(runner))
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if is_main_process():
            write(Path(runner.work_dir, 'last_checkpoint'), name)
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

    def save_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save the checkpoint of a step, then remove the outdated one."""
        outdated = None
        if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids or self.keep_ckpt_ids[-1] != step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._save(runner, self.filename_tmpl.format(step), meta)
        if is_main_process():
            if outdated is not None and outdated != step:
                Path(self.out_dir, self.filename_tmpl.format(outdated)).unlink(missing_ok=True)
            Path(self.out_dir, INTERRUPTED).unlink(missing_ok=True)

    def update_best(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint and its weights, then remove the previous one."""
        several = getattr(self, 'best_ckpt_path_dict', {})
        before = dict(several) or {None: getattr(self, 'best_ckpt_path', None)}
        if self.save_best:
            runner.message_hub.update_info(CHOSEN_BY, self._describe_choice())
        # MMEngine would remove the old one first, so its path is hidden.
        self.best_ckpt_path = None
        several.update(dict.fromkeys(several))
        super().update_best(runner, metrics)
        for key, old in before.items():
            new = several[key] if several else self.best_ckpt_path
            if new is None:  # not better
                if several:
                    several[key] = old
                else:
                    self.best_ckpt_path = old
            elif is_main_process():
                self._write_weights(Path(new))
                for path in (Path(old), get_weights_path(Path(old))) if old and old != new else ():
                    path.unlink(missing_ok=True)

    def _write_weights(self, best: Path) -> None:
        content = load(best)
        meta = {key: content['meta'][key] for key in ('epoch', 'iter', 'dataset_meta', 'run') if key in content['meta']}
        write(get_weights_path(best), serialize(dict(meta=meta, state_dict=content['state_dict'])))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check that weights are finite, and add the state for exact resuming.

        Raises:
            InputError: if weights contain NaN or inf.
        """
        for part in ('state_dict', 'ema_state_dict'):
            if nonfinite := find_nonfinite(checkpoint.get(part, {})):
                raise InputError(
                    f'weights contain NaN or inf ({list_briefly(nonfinite)}) and were not saved; '
                    f'{describe_last_checkpoint(runner)}. Use --resume with a lower learning rate'
                )
        meta, loop = checkpoint['meta'], runner.train_loop
        if hasattr(loop, 'step_settings'):
            meta['steps'] = loop.step_settings
            meta['products'] = dict(CHOSEN)
        if hasattr(loop, 'epoch_start'):
            meta['iter_in_epoch'] = meta['iter'] - loop.epoch_start if meta['epoch'] == loop.epoch else 0
        if 'optimizer' in checkpoint and not runner.optim_wrapper.should_update():
            named = unwrap_model(runner).named_parameters()
            checkpoint['gradients'] = {name: p.grad.cpu() for name, p in named if p.grad is not None}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Set the loop's position and the accumulated gradients when resuming."""
        if is_resuming(runner) and is_training(runner):
            runner.train_loop.resumed_from = checkpoint['meta']
            gradients = checkpoint.get('gradients', {})
            for name, parameter in unwrap_model(runner).named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter)
            if gradients:
                runner.logger.info("accumulated gradients were restored (ignore MMEngine's warning below)")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Save a due checkpoint; on a signal, save and exit."""
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        if stop := self._agree_on_signal():
            self._save(runner, INTERRUPTED, dict(epoch=runner.epoch, iter=runner.iter + 1))
            self._exit(runner, stop)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Exit on a signal if this epoch is saved; a resumed run evaluates it again."""
        saved = runner.message_hub.runtime_info.get('last_ckpt')
        is_saved = saved and os.path.basename(saved) == self.filename_tmpl.format(count_progress(runner))
        if is_saved and (stop := self._agree_on_signal()):
            self._exit(runner, stop)

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint, and record that this epoch is evaluated.

        A checkpoint with an AP or PQ of 0, or of -1 (no objects), is never the best one.
        """
        useless = [key for key, value in metrics.items() if key.startswith(PREFIXES) and not value > 0]
        wanted = [key for key in getattr(self, 'key_indicators', ()) if key in useless]
        for key in wanted:
            runner.logger.warning(f'{key} is {metrics[key]}: this checkpoint is not kept as the best one')
        runner.message_hub.update_info(EVALUATED, count_progress(runner))
        super().after_val_epoch(runner, {**metrics, **dict.fromkeys(wanted)})
        if is_main_process():
            write(Path(runner.work_dir, EVALUATED), str(count_progress(runner)))

    def _agree_on_signal(self) -> int:
        """Return the signal that any process received, or 0; all processes return it after the same iteration.

        They agree on the CPU while they compute the next iteration, so nothing waits.
        """
        number = torch.tensor(_received[0] if _received else 0)
        if get_world_size() == 1:
            return int(number)
        before, self.agreeing = self.agreeing, (start_max(number), number)
        if before is None:
            return 0
        work, agreed = before
        work.wait(PROMPT)
        return int(agreed)

    def _exit(self, runner: Runner, number: int) -> None:
        runner.logger.info(f'{signal.Signals(number).name}: saved {self.last_ckpt}; continue with --resume')
        raise SystemExit(128 + number)


def count_progress(runner: Runner) -> int:
    """Return the number of epochs, or of iterations if there are no epochs."""
    return runner.epoch or runner.iter


def average_gradients(model: nn.Module) -> None:
    """Average the accumulated gradients over all processes, so that one process can save them for all."""
    if get_world_size() == 1:
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    there = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int)
    all_reduce(there, 'max')
    for parameter, anywhere in zip(trained, there.tolist()):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            all_reduce(parameter.grad, 'mean')


def get_weights_path(best: Path) -> Path:
    """Return the path of the file with the weights of a best checkpoint."""
    return best.with_name(f'{best.stem}_weights.pth')


def describe_last_checkpoint(runner: Runner) -> str:
    """Return a sentence that names the last good checkpoint."""
    saved = runner.message_hub.runtime_info.get('last_ckpt')
    return f'the last good checkpoint is {saved}' if saved else 'no checkpoint was saved before'
