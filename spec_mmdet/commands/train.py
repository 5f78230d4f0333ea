"""Train a detector, after checking all of its inputs.

    spec-mmdet train xcit_spec_maskrcnn --data FOLDER --auto-scale-lr

The options are those of MMDetection's own script, --data, and those of the schedule: --preset, --epochs, --batch-size,
--image-size and --lr reach every place of the config that they concern, and --cfg-options come after them.
SIGTERM and Ctrl-C save after the iteration that is being computed and end with status 143 or 130, a second one ends at
once; --resume goes on exactly there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.device import get_device

from ..checkpoints.reading import fetch
from ..configs import CONFIGS
from ..errors import InputError
from ..training.guards import end_workers
from ..training.processes import decide_on_main
from ..training.resume import explain_resume_errors, find_newest_checkpoint, lock_folder, require_no_checkpoints
from ..training.saving import stop_on_signals
from ..training.schedule import set_epochs, set_image_size
from .common import (
    adapt_to_data,
    add_run_options,
    build_runner,
    load_run_config,
    one_line_errors,
    parser,
    read_classes,
)
from .terminal import Terminal


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser('train', __doc__)
    add_run_options(options)
    add_training_options(options)
    options.add_argument('--image-size', type=positive(int), metavar='N', help='the shorter side of a test image in '
                         'pixels; the sizes and crops of training go with it')  # fmt: skip
    options.add_argument('--preset', choices=sorted(path.stem for path in (CONFIGS / 'presets').glob('*.py')),
                         help='a schedule in the place of the config\'s: finetune, for pretrained weights')  # fmt: skip
    return options.parse_args(argv)


def add_training_options(options: argparse.ArgumentParser) -> None:
    """What trainings of detectors and of classifiers have in common."""
    options.add_argument('--epochs', type=positive(int), metavar='N', help='train so long, warm-up and drops of the '
                         'learning rate with it')  # fmt: skip
    options.add_argument('--batch-size', type=positive(int), metavar='N', help='images a step, on each device')
    options.add_argument('--lr', type=positive(float), metavar='RATE', help='the learning rate')
    options.add_argument('--amp', action='store_true', help='train in mixed precision')
    options.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate by the images a step')
    options.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                         help='go on from a checkpoint (default: the newest whole one in the work '
                         'directory; if there is none, the training starts)')  # fmt: skip


def positive(kind: type) -> Callable[[str], float]:
    """A number above 0, for argparse."""

    def number(text: str) -> float:
        if not 0 < kind(text) < float('inf'):
            raise ValueError
        return kind(text)

    return number


def set_schedule(cfg: Config, args: argparse.Namespace) -> None:
    """What the options of the schedule say, wherever the config has it; changes ``cfg``.

    Raises:
        InputError: if the config has no place for one of them, or they contradict each other.
    """
    if args.lr and args.auto_scale_lr:
        raise InputError('--lr says the learning rate, which --auto-scale-lr would change: leave one of them out')
    if args.epochs:
        set_epochs(cfg, args.epochs)
    if args.batch_size:
        cfg.train_dataloader.batch_size = args.batch_size
    if args.lr:
        cfg.optim_wrapper.optimizer.lr = args.lr


def set_precision(cfg: Config, amp: bool) -> None:
    """Mixed precision as asked for, or as configured, where there is a GPU: MMEngine has it for those alone."""
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and get_device() == 'cpu':
        print('no GPU: training in float32 instead of mixed precision', file=sys.stderr)
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.optim_wrapper.pop('loss_scale', None)


def scale_learning_rate(cfg: Config) -> None:
    """Have the runner fit the learning rate, meant for ``auto_scale_lr.base_batch_size``, to the images a step.

    Raises:
        InputError: if the config does not say what batch size its learning rate is meant for.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise InputError('--auto-scale-lr: the config has no auto_scale_lr.base_batch_size, the images a step that its '
                         'learning rate is meant for')  # fmt: skip
    cfg.auto_scale_lr.enable = True


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    def change(cfg: Config) -> None:
        if args.preset:
            cfg.merge_from_dict(Config.fromfile(CONFIGS / 'presets' / f'{args.preset}.py').to_dict())
        set_schedule(cfg, args)
        if args.image_size:
            set_image_size(cfg, args.image_size)

    cfg = load_run_config(args, ('train', 'val', 'test'), change)
    train(cfg, args, lambda classes: adapt_to_data(cfg, ('train', 'val'), classes, not args.no_check))


def train(cfg: Config, args: argparse.Namespace, fit: Callable[[list[str] | None], None]) -> None:
    """Train what a config says, from the start or from where a checkpoint is.

    Args:
        cfg: the whole config.
        args: the command line, with the options of :func:`add_training_options`.
        fit: checks the data and has the config know the classes, given those of the checkpoint if it says.
    """
    work = Path(cfg.work_dir)

    def choose() -> tuple[str | None, list[str] | None]:
        """Return the checkpoint to resume from and its classes."""
        if args.resume is None:
            require_no_checkpoints(work)
        resumed = find_newest_checkpoint(work) if args.resume == 'auto' else args.resume
        if not resumed and cfg.get('load_from'):
            read_classes(cfg.load_from)  # only verified: a new training may have other classes
        return resumed and str(resumed), read_classes(str(resumed), resume=True) if resumed else None

    resumed, classes = decide_on_main(choose)
    if resumed:
        cfg.resume, cfg.load_from = True, fetch(resumed)
    elif cfg.get('load_from'):
        cfg.load_from = fetch(cfg.load_from)
    fit(classes)

    set_precision(cfg, args.amp)
    if args.auto_scale_lr:
        scale_learning_rate(cfg)

    setup_cache_size_limit_of_dynamo()
    terminal = None if args.verbose else Terminal()
    signals = nullcontext() if args.keep_types else stop_on_signals()  # AtomicCheckpointHook saves and stops
    with ExitStack() as lock, one_line_errors(), signals, terminal or nullcontext():
        decide_on_main(lambda: lock.enter_context(lock_folder(work)))
        runner = build_runner(cfg, terminal)
        explain_resume_errors(runner)
        try:
            runner.train()
        finally:
            end_workers(runner)
