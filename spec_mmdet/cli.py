"""What tools/train.py and tools/test.py add to MMDetection's own commands: inputs are checked before work starts."""

from __future__ import annotations

import gc
import importlib.util
import os
import shlex
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mmdet
import torch
from mmengine.config import Config
from mmengine.device import get_device

from . import checkpoint, report
from .data import set_classes, use_folder
from .errors import InputError, some
from .preflight import check_inputs


@contextmanager
def command_line() -> Iterator[None]:
    """What every command runs in: an InputError becomes one line on stderr and exit status 1; no pickle is trusted."""
    # MMEngine's use of pkg_resources is nothing that its user could put right.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    # Whatever scheme a checkpoint is loaded by.
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    try:
        yield
    except InputError as error:
        sys.exit(f'error: {error}')


@command_line()
def run_mmdet_tool(name: str) -> None:
    """Check what the command line names, then run MMDetection's own tool of that name on it, flags and all.

    Args:
        name: 'train' or 'test'.
    """
    path = Path(mmdet.__file__).parent / '.mim' / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'mmdet_{name}', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.argparse = Namespace(ArgumentParser=partial(_parser, name))
    args = tool.parse_args()
    if getattr(args, 'show_dir', None):
        # MMDetection puts a relative one below the work directory, and each batch's below the last one's.
        args.show_dir = str(Path(args.show_dir).resolve())
    if not Path(args.config).is_file():
        raise InputError(f'config {args.config}: no such file')
    training = name == 'train'
    cfg = Config.fromfile(args.config)
    if args.data:
        use_folder(cfg, args.data, ('train', 'val', 'test') if training else ('test',))
    cfg.merge_from_dict(args.cfg_options or {})

    classes = None
    trained = args.resume if training else args.checkpoint
    for path in (trained, cfg.get('load_from') if training else None):
        if path not in (None, 'auto') and '://' not in path:
            loaded = checkpoint.load(path, mmap=True)
            checkpoint.state_dict_of(loaded, f'checkpoint {path}')
            if path == trained:  # a new training may start from a detector of other classes
                classes = checkpoint.classes_of(loaded)
    loops = ('train', 'val') if training else ('test',)
    if int(os.environ.get('RANK', 0)) == 0:  # one process of several is enough to find fault
        classes = check_inputs(cfg, loops, classes)
        print(f'{len(classes)} classes: {some(classes)}' if classes else 'classes: those of the config')
    elif classes is None:
        classes = check_inputs(cfg, loops[:1])
    if classes:
        set_classes(cfg, classes)
    if not training and args.report and int(os.environ.get('RANK', 0)) == 0:
        report.prepare(args.report, cfg)
    if training and get_device() == 'cpu':
        without_amp(args, cfg)

    # Its own part of reading the command line and the config has been done.
    tool.parse_args = lambda: args
    args.cfg_options = None
    tool.Config = Namespace(fromfile=lambda path: cfg)
    with _explaining_exhaustion():
        tool.main()
    if torch.distributed.is_initialized():
        # Together, or the first process to leave can take its connections from under the others. The runner, which is
        # part of a reference cycle, would keep the group alive, and gloo's threads can abort a process that ends.
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if not training and args.report and int(os.environ.get('RANK', 0)) == 0:
        report.write(args.report, cfg, args.checkpoint, shlex.join(['python', *sys.argv]))


def without_amp(args: Namespace, cfg: Config) -> None:
    """Turn mixed precision off in a tool's arguments and config: MMEngine has it for GPUs alone."""
    if args.amp or cfg.optim_wrapper.type == 'AmpOptimWrapper':
        print('no GPU: training in float32 instead of mixed precision', file=sys.stderr)
        args.amp = False
        cfg.optim_wrapper.type = 'OptimWrapper'


@contextmanager
def _explaining_exhaustion() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and 'DefaultCPUAllocator' not in str(error):
            raise
        raise InputError(
            f'out of memory ({str(error).splitlines()[0]}). Add to --cfg-options: train_dataloader.batch_size=1 '
            'optim_wrapper.accumulative_counts=2 (the same step from half as many images at a time) or '
            'model.backbone.with_cp=True (activations are computed twice instead of kept). --resume goes on from the '
            'last checkpoint.'
        ) from error


def _parser(name: str, **kwargs) -> ArgumentParser:
    """MMDetection's parser of a command line with this project's options."""
    parser = ArgumentParser(**kwargs)
    parser.add_argument(
        '--data', type=Path, metavar='FOLDER', help="a folder in COCO's layout: annotations/instances_train*.json and "
        'instances_val*.json beside the folders train* and val* of their images (default: what the config names)'
    )  # fmt: skip
    if name == 'test':
        parser.add_argument('--report', type=Path, metavar='DIR', help='a folder for a page with the results')
    return parser
