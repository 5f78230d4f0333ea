"""Shared parts of the command lines. Slow imports are inside functions, because --help does not need them."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from ..status import show_status

if TYPE_CHECKING:
    from mmengine.config import Config

SETTING = r'[^-=][^=]*='
GRACE = 20  # seconds for processes to end and print their errors after one has failed


class CfgOptions(argparse.Action):
    """MMEngine's action for KEY=VALUE that reports an invalid value as an error of usage."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        from mmengine.config import DictAction

        if wrong := [value for value in values if '=' not in value]:
            raise argparse.ArgumentError(self, f'{wrong[0]}: write KEY=VALUE')
        try:
            DictAction(self.option_strings, self.dest)(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            raise argparse.ArgumentError(self, f'{" ".join(values)}: {error}') from error


class Parser(argparse.ArgumentParser):
    """Argument parser of a command.

    --cfg-options ends at the first argument that is not KEY=VALUE, so that a config file may follow.

    Attributes:
        made: if this is a list, parsing only adds the parser to it and exits.
        needs: the module that parsing imports at last, by default that which registers this package with MMDetection.
    """

    made: list[Parser] | None = None
    needs: str = 'registered'

    def parse_known_args(self, args=None, namespace=None):
        args, left = [], list(sys.argv[1:] if args is None else args)
        while left:
            args.append(left.pop(0))
            if args[-1] == '--cfg-options' and left and re.match(SETTING, left[0]):
                args.pop()
                while left and re.match(SETTING, left[0]):
                    args.append(f'--cfg-options={left.pop(0)}')
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        if self.made is not None:
            self.made.append(self)
            raise SystemExit
        found = super().parse_args(args, namespace)
        with show_status('loading PyTorch and MMDetection'):
            import_module(f'spec_mmdet.{self.needs}')
        return found

    def error(self, message):
        if message.startswith('unrecognized arguments'):
            options = re.findall(r'--[\w-]+', self.format_help())
            near = [
                get_close_matches(word.partition('=')[0], options, 1) for word in message.split() if word[:2] == '--'
            ]
            message += ''.join(f'; did you mean {found[0]}?' for found in near[:1] if found)
        super().error(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formatter that breaks no word of an option's help at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(' '.join(text.split()), width, break_long_words=False, break_on_hyphens=False)


@contextmanager
def collect_parsers() -> Iterator[list[Parser]]:
    """Yield a list that receives the parser of a command that is run in this context; the command exits then."""
    Parser.made = []
    try:
        yield Parser.made
    finally:
        Parser.made = None


def wrap_text(text: str) -> str:
    """Wrap a docstring to the terminal's width: paragraphs, and the entries of indented lists. No word is broken."""
    width, blocks = shutil.get_terminal_size().columns - 2, []
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    for block in text.strip('\n').split('\n\n'):
        indent = len(block) - len(block.lstrip(' '))
        if not indent:
            blocks.append(fill(' '.join(block.split())))
            continue
        entries = re.sub(rf'\n {{{indent + 1},}}', ' ', block).split('\n')  # without continuation lines
        for i, entry in enumerate(entries):
            column = re.match(r'.*\S  +(?=\S)', entry)  # ends where the last column begins
            if len(entry) > width and column and column.end() > width / 2:
                entry, column = re.sub(r'(?<=\S) {3,}', '  ', entry), None
            entries[i] = fill(entry, subsequent_indent=' ' * (column.end() if column else indent + 4))
        blocks.append('\n'.join(entries))
    return '\n\n'.join(blocks)


def make_parser(command: str, doc: str, program: str = 'spec-mmdet') -> Parser:
    """Make a command's parser, with the docstring of its module as help."""
    first, _, rest = doc.partition('\n')
    return Parser(
        f'{program} {command}',
        description=wrap_text(first),
        epilog=wrap_text(rest),
        formatter_class=HelpFormatter,
    )


def require_positive(kind: type) -> Callable[[str], float]:
    """Return a type for argparse: a finite number above 0."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if 0 < kind(text) < float('inf'):
                return kind(text)
        what = 'an integer from 1 on' if kind is int else 'a number above 0'
        raise argparse.ArgumentTypeError(f'{text}: give {what}')

    return parse


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that takes a config."""
    parser.add_argument('config', help='a config file, or the name of a config that spec_mmdet ships')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE', help='settings to change '
                        'in the config; write lists as KEY="[a,b]" or KEY=a,b')  # fmt: skip


def add_keep_types(parser: argparse.ArgumentParser) -> None:
    """Add --keep-types."""
    parser.add_argument('--keep-types', action='store_true', help="keep the config's types; by default, MMDetection's "
                        "are replaced by this package's checked ones")  # fmt: skip


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that train, pretrain and test share, with those of MMDetection's scripts."""
    add_config(parser)
    parser.add_argument('--data', type=Path, metavar='FOLDER', help="a folder in COCO's layout: "
                        'annotations/instances_train*.json and instances_val*.json, and folders train* and val* of '
                        'images; pretrain needs train/CLASS/ and val/CLASS/ (default: the data that the config '
                        'names)')  # fmt: skip
    parser.add_argument('--no-check', action='store_true', help='skip the checks of each annotation and image')
    add_keep_types(parser)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--verbose', action='store_true', help='show the whole log in the terminal')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='distributed job launcher: pytorch for torchrun, slurm for srun, mpi for mpirun '
                        '(default: none, one process)')  # fmt: skip
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='rank on this machine, as launchers '
                        'before torchrun pass it (default: 0)')  # fmt: skip


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that train and pretrain share."""
    parser.add_argument('--epochs', type=require_positive(int), metavar='N', help='number of epochs; warm-up and '
                        "learning-rate steps are rescaled (default: the config's)")  # fmt: skip
    parser.add_argument('--batch-size', type=require_positive(int), metavar='N', help='batch size per device (default: '
                        "the config's)")  # fmt: skip
    parser.add_argument(
        '--lr', type=require_positive(float), metavar='RATE', help="learning rate (default: the config's)"
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision, which needs a GPU (default: '
                        "the config's precision)")  # fmt: skip
    parser.add_argument('--auto-scale-lr', action='store_true', help='rescale the learning rate linearly to the total '
                        'batch size (default: keep it)')  # fmt: skip
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT', help='resume from a checkpoint '
                        '(without CHECKPOINT: from the newest intact one in the work directory, or start if it has '
                        'none)')  # fmt: skip


def load_config(args: argparse.Namespace) -> Config:
    """Read the config of a command line, and merge its --cfg-options.

    Raises:
        InputError: if the file does not exist, or an option has no effect.
    """
    from ..configs import find_config, read_config
    from .options import adjust_dependent_settings, merge

    cfg = read_config(find_config(args.config))
    merge(cfg, args.cfg_options)
    adjust_dependent_settings(cfg)
    return cfg


def load_run_config(
    args: argparse.Namespace, splits: Sequence[str], change: Callable[[Config], None] | None = None
) -> Config:
    """Read the config of a run, apply the options in MMDetection's order, and connect the processes.

    Args:
        args: the command line, with the options of :func:`add_run_options`.
        splits: loops that use --data, of 'train', 'val' and 'test'; empty if ``change`` uses --data.
        change: function that applies a command's own options to the config, before --cfg-options.
    """
    from ..configs import find_config, read_config
    from ..data.tasks import use_folder
    from ..processes import connect_processes
    from ..substitution import protect
    from .options import adjust_dependent_settings, merge, require_complete_loops

    path = find_config(args.config)
    cfg = read_config(path)
    if args.data and splits:
        use_folder(cfg, args.data, splits)
    if change:
        change(cfg)
    merge(cfg, args.cfg_options)
    testing = tuple(splits) == ('test',)
    require_complete_loops(cfg, 'test' if testing else 'train')
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or os.path.join('work_dirs', path.stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    connect_processes(cfg)
    protect(cfg, args.keep_types, testing=testing)
    adjust_dependent_settings(cfg)
    return cfg


def run_command(*command: str | Path) -> None:
    """Run a command of spec-mmdet in a separate process, and print it.

    Raises:
        InputError: if it fails; the command prints the reason.
    """
    print('\n$ spec-mmdet', *command, flush=True)
    if subprocess.run([sys.executable, '-m', 'spec_mmdet', *map(str, command)]).returncode:
        raise make_failure(command)


def run_in_processes(processes: int, threads: int, *command: str | Path) -> None:
    """Run a command of spec-mmdet in connected processes on this machine, and print it as a command of torchrun.

    Args:
        processes: number of processes.
        threads: number of threads of each process.
        command: the command and its arguments, without --launcher.

    Raises:
        InputError: if a process fails; it prints the reason. The others are ended.
    """
    from torch.distributed.elastic.utils.distributed import get_free_port

    words = ['-m', 'spec_mmdet', *map(str, command), '--launcher', 'pytorch']
    print(f'\n$ OMP_NUM_THREADS={threads} torchrun --nproc_per_node {processes}', *words, flush=True)
    names = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=get_free_port(), WORLD_SIZE=processes)
    names |= dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    # Not by torchrun, which would print a traceback, too, and can end the main process before that prints its error.
    started = []
    try:
        for rank in range(processes):
            own = {name: str(value) for name, value in dict(names, RANK=rank, LOCAL_RANK=rank).items()}
            started.append(subprocess.Popen([sys.executable, *words], env=os.environ | own))
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.1)
        for process in started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        for process in started:
            process.kill()
    if any(process.wait() for process in started):
        raise make_failure(command)


def make_failure(command: Sequence[str | Path]) -> InputError:
    """Return the error of a command that failed and printed the reason."""
    return InputError(f'"spec-mmdet {" ".join(map(str, command))}" failed. Its error message is above')
