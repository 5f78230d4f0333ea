"""Show a run, its progress and its results in the terminal; everything else goes to the log file."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..compat import get_load_path, is_resuming, is_training
from ..conditioning.correction import describe_conditioning
from ..files import display_path
from ..models.xcit import SpecXCiT
from ..training.hooks import find_learning_rate, summarise_schedule
from ..training.saving import unwrap_model

PACKAGE = Path(__file__).parents[1]
# Warnings of libraries for developers, and those that our own errors replace.
UNIMPORTANT = re.compile(
    r'deprecat|is the alias of|dataset_meta or class names|visualization|pkg_resources|skipped since its requires_grad',
    re.I,
)
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
SIZES = dict(AP='', AP50='_50', AP75='_75', small='_s', medium='_m', large='_l')


console = Console(highlight=False)


def print_lines(*lines: str) -> None:
    """Print lines without markup, above the bar."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


# Must subclass StreamHandler: an MMEngine backend assumes that every handler has a stream.
class ImportantLogHandler(logging.StreamHandler):
    """Log handler that shows errors, warnings and this package's records in the terminal."""

    def filter(self, record: logging.LogRecord) -> bool:
        is_ours = PACKAGE in Path(record.pathname).parents or record.module == 'early_stopping_hook'
        is_important = record.levelno >= logging.WARNING and not UNIMPORTANT.search(record.getMessage())
        return is_main_process() and (is_ours or is_important) or record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        kind = f'{record.levelname.lower()}: ' if record.levelno >= logging.WARNING else ''
        print_lines(f'{kind}{record.getMessage()}')


class Bar(Progress):
    """Progress bar with a line of metrics below."""

    metrics = ''

    def get_renderables(self):
        yield from super().get_renderables()
        yield Text(self.metrics)


class Terminal(Hook):
    """Hook that shows a run in the terminal of the main process.

    Enter this context before the runner is built, then call :meth:`attach`. A terminal shows a progress bar; other
    outputs get a line whenever MMEngine's logger writes one.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.bar: Bar | None = None

    def __enter__(self) -> Terminal:
        self.showwarning, warnings.showwarning = warnings.showwarning, self._warn
        return self

    def __exit__(self, *_) -> None:
        warnings.showwarning = self.showwarning
        self._end()

    def attach(self, runner: Runner) -> None:
        """Show a runner."""
        self.interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 50)
        if is_main_process():
            runner.register_hook(self)

    def _warn(self, message, category, filename, lineno, file=None, line=None) -> None:
        # Warnings for developers go only to the log file.
        for_users = category is UserWarning and not UNIMPORTANT.search(str(message))
        print_log(str(message).strip(), 'current', logging.WARNING if for_users else logging.INFO)

    def _begin(self, title: str, total: int | None, done: int = 0) -> None:
        self._end()
        if console.is_terminal:
            columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self.bar = Bar(*columns, console=console, transient=True, refresh_per_second=4)
            self.bar.add_task(title, total=total, completed=done)
            self.bar.start()

    def _end(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None

    def before_train(self, runner: Runner) -> None:
        """Print model, data, schedule, device and log file."""
        print_lines('', *describe_model(runner), *describe_schedule(runner), *describe_device(runner))
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._begin('training', runner.max_iters, runner.iter)

    def before_test(self, runner: Runner) -> None:
        """Print model, device and log file."""
        print_lines('', *describe_model(runner), *describe_device(runner))

    def before_train_epoch(self, runner: Runner) -> None:
        """Start an epoch's progress bar."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._begin(f'epoch {runner.epoch + 1}/{runner.max_epochs}', len(runner.train_dataloader))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Show losses, learning rate, images per second, memory and remaining time."""
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        done, total = (batch_idx + 1, len(runner.train_dataloader)) if by_epoch else (runner.iter + 1, runner.max_iters)
        images = len(data_batch['inputs'])
        # MMEngine's own number is negative after a resumption with shorter epochs.
        remaining = total - done + (runner.max_epochs - runner.epoch - 1) * total * by_epoch
        if self.bar:
            self.bar.metrics = format_progress(runner, images, runner.log_processor.window_size, remaining)
            self.bar.update(self.bar.task_ids[0], completed=done)
        if done == total or not self.bar and done % self.interval == 0:
            where = f'epoch {runner.epoch + 1}/{runner.max_epochs}  ' if by_epoch else ''
            line = format_progress(runner, images, min(done, self.interval), remaining)
            print_lines(f'{where}{done:{len(str(total))}}/{total}  {line}')

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self.title, loader = dict(val=('validating', 'val_dataloader'), test=('testing', 'test_dataloader'))[mode]
        self.batches = len(getattr(runner, loader))
        self._begin(self.title, self.batches)

    def _after_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None, mode: str = 'train') -> None:
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=batch_idx + 1)
        elif (batch_idx + 1) % self.interval == 0:
            print_lines(f'{self.title}  {batch_idx + 1}/{self.batches} batches')
        if batch_idx + 1 == self.batches:
            self._begin('computing metrics', None)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the metrics in one line."""
        self._end()
        if not is_training(runner) or not isinstance(runner.train_loop, EpochBasedTrainLoop):
            print_lines(', '.join(format_metrics(metrics or {})))
            return
        best = Path(runner.message_hub.runtime_info.get('best_ckpt') or '').stem.endswith(f'_epoch_{runner.epoch}')
        print_lines(f'epoch {runner.epoch}/{runner.max_epochs}  validation: {", ".join(format_metrics(metrics or {}))}'
                 f'{": the best so far" * best}')  # fmt: skip

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Print the metrics as a table."""
        self._end()
        rest, undefined = dict(metrics or {}), []
        if rows := [(name, key) for key, name in METRICS.items() if key in rest]:
            print_lines('', ' ' * 8 + ''.join(f'{size:>9}' for size in SIZES))
        for name, key in rows:
            values = [rest.pop(f'{key}{suffix}', float('nan')) for suffix in SIZES.values()]
            rest.pop(f'{key}_copypaste', None)
            print_lines(f'{name:8}' + ''.join(f'{value:9.3f}' if value != -1 else f'{"-":>9}' for value in values))
            undefined += [size for size, value in zip(SIZES, values) if value == -1]
        if undefined:
            print_lines(
                f'{", ".join(dict.fromkeys(undefined))}: undefined (-1), because the data contains no such objects'
            )
        print_lines(*format_metrics(rest))

    def after_train(self, runner: Runner) -> None:
        """Print the paths of the checkpoints."""
        self._end()
        loop = runner.train_loop
        if getattr(loop, 'stop_training', False):
            by_epoch = isinstance(loop, EpochBasedTrainLoop)
            where = ('epoch', loop.epoch, loop.max_epochs) if by_epoch else ('iteration', loop.iter, loop.max_iters)
            print_lines('stopped early, after {} {} of {}'.format(*where))
        saved = {name: runner.message_hub.runtime_info.get(f'{name}_ckpt') for name in ('last', 'best')}
        print_lines('', *(f'{name} checkpoint: {display_path(path)}' for name, path in saved.items() if path))


def pluralise(number: int, what: str) -> str:
    return f'{number} {what}{"s" * (number != 1)}'


def describe_model(runner: Runner) -> list[str]:
    model = unwrap_model(runner)
    backbone = getattr(model, 'backbone', None)
    count = sum(p.numel() for p in model.parameters())
    if not count:  # an exported detector
        return [f'model     {type(model).__name__} of {display_path(model.path)}']
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    what = f'{type(model).__name__} on {type(backbone).__name__}' if backbone else type(model).__name__
    lines = [
        f'model     {what}, {count / 1e6:.1f} M parameters{f", {frozen / 1e6:.1f} M of them frozen" * bool(frozen)}'
    ]
    if isinstance(backbone, SpecXCiT):
        conditioning = describe_conditioning(backbone.state_dict())
        lines.append(f'          conditioning: {conditioning if conditioning != "None" else "none, a plain XCiT"}')
    if get_load_path(runner):
        source = f'{"resumed from" if is_resuming(runner) else "from"} {display_path(get_load_path(runner))}'
    else:
        init_cfg = getattr(backbone, 'init_cfg', None) or {}
        pretrained = init_cfg.get('checkpoint') if isinstance(init_cfg, dict) else None
        source = f'backbone from {display_path(pretrained)}, all others random' if pretrained else 'random'
    return [*lines, f'weights   {source}']


def describe_schedule(runner: Runner) -> list[str]:
    loader, loop = runner.train_dataloader, runner.train_loop
    images = len(loader.dataset)
    of_images = f'{images} images, total batch size {loader.batch_sampler.batch_size * get_world_size()}'
    length = f'{runner.max_iters} iterations'
    if isinstance(loop, EpochBasedTrainLoop):
        length = f'{pluralise(runner.max_epochs, "epoch")} of {pluralise(len(loader), "iteration")}'
    warm_up, drops = summarise_schedule(runner)
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    rate = ''
    if optimizer:
        peak = max(group.get('initial_lr', group['lr']) for group in optimizer.param_groups)
        rate = f', {type(optimizer).__name__}, learning rate {peak:.2g}'
    rate += f' after {pluralise(warm_up, "iteration")} of warm-up' * (warm_up > 0)
    rate += f', lower from iteration {" and ".join(map(str, sorted(drops)))}' * bool(drops)
    return [f'data      {of_images}', f'schedule  {length}{rate}']


def describe_device(runner: Runner) -> list[str]:
    model = unwrap_model(runner)
    device = next((p.device for p in model.parameters()), model.data_preprocessor.device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type.upper()
    threads = f', {pluralise(torch.get_num_threads(), "thread")}' * (device.type == 'cpu')
    several = f', {get_world_size()} processes' * (get_world_size() > 1)
    mixed = isinstance(getattr(runner, 'optim_wrapper', None), AmpOptimWrapper)
    path = display_path(runner.logger.log_file)
    return [
        f'device    {name}{threads}{several}, {"mixed precision" if mixed else "float32"}',
        f'log       {path} (config, environment and everything else; --verbose shows it)',
        '',
    ]


def format_progress(runner: Runner, images: int, window: int, remaining: int) -> str:
    """Format losses, learning rate, images per second, memory and remaining time.

    Args:
        runner: the running training.
        images: number of images in the iteration that has just ended.
        window: number of iterations to average over.
        remaining: number of iterations until the end of the training.
    """
    hub = runner.message_hub
    means = {name.removeprefix('train/'): float(buffer.mean(window)) for name, buffer in hub.log_scalars.items()
             if re.match('train/(.*loss|time$)', name)}  # fmt: skip
    loss, seconds = means.pop('loss', float('nan')), means.pop('time', None)
    parts = ', '.join(f'{name.removeprefix("loss_")} {value:.3f}' for name, value in means.items())
    logged = hub.log_scalars.get('train/lr')  # of the iteration that has just ended
    rate = logged.current() if logged else find_learning_rate(runner)
    line = f'loss {loss:.3f}' + f' ({parts})' * bool(parts) + f'  rate {rate:.1e}'
    memory = f'  {measure_peak_memory() / 2**30:.1f} GiB'
    if seconds is None:
        return line + memory
    speed = f'  {images * get_world_size() / seconds:.1f} images/s'
    return f'{line}{speed}{memory}  {timedelta(seconds=int(seconds * remaining))} left'


def measure_peak_memory() -> float:
    """Return the peak memory of this process in bytes, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # absent on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def format_metrics(metrics: dict[str, float]) -> list[str]:
    """Format metrics with their usual names; COCO AP is followed by AP50 and AP75."""
    parts, rest = [], dict(metrics)
    for key, name in METRICS.items():
        if key in rest:
            others = (f'{size} {rest[key + SIZES[size]]:.3f}' for size in ('AP50', 'AP75') if key + SIZES[size] in rest)
            parts.append(f'{name} {rest[key]:.3f} ({", ".join(others)})')
            rest = {other: value for other, value in rest.items() if not other.startswith(key)}
    return parts + [
        f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}' for name, value in rest.items()
    ]
