"""What commands share: how they end, their configs, and the checks before a run."""

from __future__ import annotations

import argparse
import copy
import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from mmdet.registry import RUNNERS
from mmengine.config import Config
from mmengine.runner import Runner

from ..checkpoints.reading import get_classes, get_state_dict, load, require_training_state
from ..configs import find_config, read_config
from ..data.checks import check_inputs
from ..data.fitting import (
    has_masks,
    require_monitored_metrics,
    require_one_annotation_file,
    set_classes,
    state_classes_once,
    use_masks_as_the_model,
)
from ..data.folders import use_folder
from ..errors import InputError, list_briefly
from ..substitution import protect
from ..training.processes import connect_processes, decide_on_main, leave_group
from .options import CfgOptions, Parser, adjust_dependent_settings, merge
from .runners import QuietRunner, WholeConfigRunner
from .terminal import Terminal


def parser(command: str, doc: str, program: str = 'spec-mmdet') -> Parser:
    """A command's parser, described by the first line of its module's docstring and the rest of it."""
    first, _, rest = doc.partition('\n')
    return Parser(
        f'{program} {command}',
        description=first,
        epilog=rest.strip('\n'),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that takes a config."""
    parser.add_argument('config', help='a config file, or the name of one that spec_mmdet ships')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help='settings to change in'
                        ' the config; lists as KEY="[a,b]" or KEY=a,b')  # fmt: skip


def add_keep_types(parser: argparse.ArgumentParser) -> None:
    """Add --keep-types."""
    parser.add_argument('--keep-types', action='store_true', help="leave the config's types as they are, instead of "
                        "substituting this package's checked ones for MMDetection's")  # fmt: skip


def load_config(args: argparse.Namespace) -> Config:
    """The config that a command line names, its --cfg-options merged.

    Raises:
        InputError: if there is no such file.
    """
    cfg = read_config(find_config(args.config))
    merge(cfg, args.cfg_options)
    adjust_dependent_settings(cfg)
    return cfg


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What train and test have in common, MMDetection's scripts' own options among them."""
    add_config(parser)
    parser.add_argument('--data', type=Path, metavar='FOLDER', help="a folder in COCO's layout: annotations/"
                        'instances_train*.json and instances_val*.json beside the folders train* and val* of their '
                        'images (default: what the config names)')  # fmt: skip
    parser.add_argument('--no-check', action='store_true', help='do not look at annotations and images one by one '
                        'before the start')  # fmt: skip
    add_keep_types(parser)
    parser.add_argument('--work-dir', help='where to write logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--verbose', action='store_true', help='show all that is written to the log file')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='what has started this process as one of several')  # fmt: skip
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help='as launchers older than torchrun pass it'
    )


def load_run_config(
    args: argparse.Namespace, splits: Sequence[str], change: Callable[[Config], None] | None = None
) -> Config:
    """The config of a run: file, data folder, options, launcher and work directory, in MMDetection's precedence.

    Args:
        args: the command line, with the options of :func:`add_run_options`.
        splits: the loops that --data is for, of 'train', 'val' and 'test'; none where ``change`` sees to it.
        change: what a command's own options change of the config; --cfg-options come after it.
    """
    path = find_config(args.config)
    cfg = read_config(path)
    if args.data and splits:
        use_folder(cfg, args.data, splits)
    if change:
        change(cfg)
    merge(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or os.path.join('work_dirs', path.stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    connect_processes(cfg)
    protect(cfg, args.keep_types, testing=tuple(splits) == ('test',))
    adjust_dependent_settings(cfg)
    return cfg


def read_classes(path: str, resume: bool = False) -> list[str] | None:
    """The classes of a detector's checkpoint, if it says.

    Args:
        path: a file, or an address.
        resume: whether a training is to go on from it.

    Raises:
        InputError: if it cannot be read, or is no detector's, or has not what a training needs.
    """
    content = load(path, mmap=True)
    get_state_dict(content, f'checkpoint {path}')
    if resume:
        require_training_state(content, f'checkpoint {path}')
    return get_classes(content)


def adapt_to_data(cfg: Config, loops: Sequence[str], classes: Sequence[str] | None, thorough: bool = True) -> None:
    """Check in the main process the data that a run reads, and adapt the config to it; changes ``cfg``.

    Args:
        cfg: the whole config.
        loops: the parts that the run uses, of 'train', 'val' and 'test', what names the classes first.
        classes: what they must be, if that is known.
        thorough: whether to look at annotations and images one by one.
    """

    def adapt(config: Config, found: Sequence[str] | None, check: bool) -> Sequence[str] | None:
        stated = state_classes_once(config)
        masks_changed = use_masks_as_the_model(config)
        if check:
            require_one_annotation_file(config, loops)
            if 'train' in loops:
                require_monitored_metrics(config)
            if masks_changed and not has_masks(config.get('model')):
                print('the detector has no mask head: masks are neither loaded nor evaluated')
            found = check_inputs(config, loops, found, thorough)
            print(f'{len(found)} classes: {list_briefly(found)}' if found else 'classes: those of the config')
        if found:
            set_classes(config, found, "metainfo.classes of the config's data sets" if stated else 'the data')
        return found

    adapt(cfg, decide_on_main(lambda: adapt(copy.deepcopy(cfg), classes, check=True)), check=False)


def build_runner(cfg: Config, terminal: Terminal | None = None) -> Runner:
    """MMEngine's runner, or the one that the config names.

    Args:
        cfg: the whole config.
        terminal: what shows it, entered; by default all that MMEngine says is shown.
    """
    kind = WholeConfigRunner if terminal is None else QuietRunner
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else kind.from_cfg(cfg)
    if terminal is not None:
        terminal.attach(runner)
    return runner


def run_command(*command: str | Path) -> None:
    """Run a command of spec-mmdet in a process of its own, saying so.

    Raises:
        InputError: if it fails, which it has explained by then.
    """
    print('\n$ spec-mmdet', *command, flush=True)
    if subprocess.run([sys.executable, '-m', 'spec_mmdet', *map(str, command)]).returncode:
        raise InputError(f'this step failed: spec-mmdet {" ".join(map(str, command))}')


# What PyTorch says when something other than the program has gone wrong, and what to say of it.
TROUBLES = {
    'DataLoader worker': 'a worker that loads images has died, often for want of memory or shared memory (df /dev/shm; '
    'docker run --shm-size=8g gives a container more; --cfg-options train_dataloader.num_workers=0 needs none)',
    'DataLoader timed out': 'no worker has loaded images for so long: a disk that does not answer, or a process that '
    'is stopped',
    'Timed out waiting': 'another process has not answered within env_cfg.dist_cfg.timeout: it hangs, or has ended',
    'Connection closed by peer': 'another process has ended',
    'Connection reset by peer': 'another process has ended',
}


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn known runtime errors into one-line InputErrors, and leave the process group at the end."""
    logging.raiseExceptions = False  # a full disk is one line, not one of each of the log's
    try:
        yield
    except InputError as error:  # of a process that loads data, it holds that one's traceback
        raise InputError(str(error).rpartition('InputError: ')[2].removesuffix(r'\n')) from error
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition('\n')[0]
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or 'DefaultCPUAllocator' in str(error):
            raise InputError(
                f'out of memory ({first}). Add to --cfg-options: model.backbone.with_cp=True (activations are computed '
                'twice instead of kept; --resume goes on with it from the last checkpoint) or, for a training from the '
                'start, train_dataloader.batch_size=1 optim_wrapper.accumulative_counts=2 (the same step from half as '
                'many images at a time).'
            ) from error
        for sign, meaning in TROUBLES.items():
            if sign in str(error):
                raise InputError(f'{meaning} ({first}). --resume goes on from the last checkpoint.') from error
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            raise
        raise InputError(
            f'{error.filename or "a file of the run"}: could not be written ({error.strerror}); --resume goes on from '
            'the last checkpoint'
        ) from error
    except SystemExit:
        leave_group()
        raise
    leave_group()
