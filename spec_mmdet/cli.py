"""What tools/train.py and tools/test.py add to MMDetection's own commands: inputs are checked before work starts."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mmdet
import torch
from mmengine.config import Config
from mmengine.device import get_device

from . import checkpoint, report
from .errors import InputError
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
    if name == 'test':
        own = argparse.ArgumentParser(add_help=False)
        own.add_argument('--report', type=Path, metavar='DIR', help='folder for a page with the results')
        tool.argparse = Namespace(ArgumentParser=partial(argparse.ArgumentParser, parents=[own]))
    args = tool.parse_args()
    if getattr(args, 'show_dir', None):
        # MMDetection puts a relative one below the work directory, and each batch's below the last one's.
        args.show_dir = str(Path(args.show_dir).resolve())
    tool.parse_args = lambda: args
    if not Path(args.config).is_file():
        raise InputError(f'config {args.config}: no such file')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    if int(os.environ.get('RANK', 0)) == 0:  # one process of several is enough to find fault
        check_inputs(cfg, ('train', 'val') if name == 'train' else ('test',))
        for path in [args.checkpoint] if name == 'test' else [args.resume, cfg.get('load_from')]:
            if path not in (None, 'auto') and '://' not in path:
                checkpoint.state_dict_of(checkpoint.load(path, mmap=True), f'checkpoint {path}')
        if name == 'test' and args.report:
            args.cfg_options = {**(args.cfg_options or {}), **report.prepare(args.report, cfg)}
    if name == 'train' and get_device() == 'cpu':
        without_amp(args, cfg)
    tool.main()
    if torch.distributed.is_initialized():
        # Together, or the first process to leave can take its connections from under the others.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if name == 'test' and args.report and int(os.environ.get('RANK', 0)) == 0:
        report.write(args.report, cfg, args.checkpoint, shlex.join(['python', *sys.argv]))


def without_amp(args: Namespace, cfg: Config) -> None:
    """Turn mixed precision off in a tool's arguments: MMEngine has it for GPUs alone."""
    if args.amp or cfg.optim_wrapper.type == 'AmpOptimWrapper':
        print('no GPU: training in float32 instead of mixed precision', file=sys.stderr)
        args.amp = False
        args.cfg_options = {**(args.cfg_options or {}), 'optim_wrapper.type': 'OptimWrapper'}
