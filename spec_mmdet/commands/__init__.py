"""The commands: ``spec-mmdet NAME``, one module each, with a ``main``."""

from __future__ import annotations

import argparse
import locale
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec

from .. import __version__
from ..errors import InputError

GROUPS = {
    'data and training': {
        'demo': 'generate data, train, and evaluate, in minutes on a CPU',
        'prepare': 'check, convert, split or subsample a data set',
        'train': 'train a detector',
        'pretrain': 'train a classifier whose backbone a detector can start from',
    },
    'results': {
        'test': 'evaluate a detector: COCO AP and an HTML report',
        'compare': 'compare trainings: AP over seeds, intervals, curves',
        'predict': 'detect objects in images, folders and videos',
    },
    'checkpoints': {
        'convert': "convert XCiT checkpoints to this project's layout and others",
        'export': 'write a detector or its backbone as ONNX',
        'publish': 'write a folder for other users: weights, config, model card',
    },
    'measurements': {
        'analyze': "compute condition numbers of a backbone's attention",
        'benchmark': "measure time and memory, compared with timm's XCiT and others",
        'flops': 'count parameters and multiply-adds of configs',
        'gpu-check': 'check results and speed on a GPU',
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}
SHELLS = ('bash', 'zsh', 'tcsh')

# Commands of earlier versions, and their replacements.
REMOVED = {
    'shapes': 'spec-mmdet demo, or write_shapes of spec_mmdet.data.shapes in Python',
    'scenes': 'python -m research.scenes in a checkout',
    'overfit': 'python -m benchmarks.overfit in a checkout',
    'experiment': 'python -m research.experiment in a checkout',
    'systems': 'python -m research.systems in a checkout',
    'paper-figures': 'python -m research.paper_figures in a checkout',
    'benchmark-evaluator': 'python -m benchmarks.evaluator in a checkout',
}

NO_LIBGL = (
    'OpenCV lacks a system library. Use its headless build: pip uninstall opencv-python, then pip install '
    '--force-reinstall --no-deps opencv-python-headless. Or, as root: apt-get install libgl1'
)
NEEDED = ('mmdet', 'mmengine', 'mmcv')
NO_MMDETECTION = (
    "MMDetection is not installed (no {}). Install it: pip install 'spec_mmdet[mmdet]' (in a checkout: pip install -e "
    "'.[mmdet]')"
)


def find_missing() -> list[str]:
    """Return the packages of MMDetection's stack that are not installed."""

    def is_missing(name: str) -> bool:
        try:
            return find_spec(name) is None
        except (ImportError, ValueError):
            return True

    return [name for name in NEEDED if is_missing(name)]


@contextmanager
def command_line() -> Iterator[None]:
    """Context for every command: print an InputError or an error of a config as one line, and exit with status 1.

    No code from checkpoints is run in this context. At its end, environment variables are as before.
    """
    # MMEngine uses pkg_resources.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    # MMSegmentation, about its own calls and defaults.
    warnings.filterwarnings('ignore', message='``build_loss`` would be deprecated|Default ``avg_non_ignore``')
    # With gradient accumulation, the schedule counts iterations, and the first ones are not optimiser steps.
    warnings.filterwarnings('ignore', message=r'Detected call of `scheduler.step\(\)` before')
    # In several processes, for kernels of 1 x 1, whose strides may differ although their order in memory is the same.
    warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
    if locale.getpreferredencoding(False).lower().replace('-', '') != 'utf8' and not sys.flags.utf8_mode:
        # Otherwise MMEngine could not log names outside ASCII.
        os.execv(sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]])
    before = dict(os.environ)
    if os.environ.get('MPLBACKEND', '').startswith('module://'):
        del os.environ['MPLBACKEND']  # set by a notebook, for its own environment
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    try:
        yield
    except InputError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        if isinstance(error, ImportError) and 'libGL' in str(error):
            sys.exit(f'error: {NO_LIBGL} ({error})')
        if isinstance(error, ImportError) and (missing := find_missing()):
            sys.exit(f'error: {NO_MMDETECTION.format(", ".join(missing))}')
        from .options import explain_config_error

        if (fault := explain_config_error(error)) is None:
            raise
        sys.exit(f'error: {fault}')
    except KeyboardInterrupt:
        sys.exit(130)  # the shells' status for Ctrl-C
    finally:  # only what differs, because other threads may read the environment
        for name in [name for name in {*os.environ, *before} if os.environ.get(name) != before.get(name)]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


def run(command: str, argv: Sequence[str] | None = None) -> None:
    """Run a command of :data:`COMMANDS`; exit with one line on stderr if its input is invalid.

    Args:
        command: name of the command.
        argv: its arguments; by default those of the process.
    """
    with command_line():
        asks_help = bool({'-h', '--help'} & {*(sys.argv[1:] if argv is None else argv)})
        if (missing := ', '.join(find_missing())) and not asks_help:
            raise InputError(NO_MMDETECTION.format(missing))
        try:
            import_module(f'.{command.replace("-", "_")}', __name__).main(argv)
        except SystemExit as ended:
            if missing and not ended.code:
                print(NO_MMDETECTION.format(missing), file=sys.stderr)
            raise


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``spec-mmdet [--help | --version | --print-completion SHELL | COMMAND ...]``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        run(argv[0], argv[1:])
        return
    if argv and argv[0] in REMOVED:
        print(f'error: spec-mmdet {argv[0]} was removed; use {REMOVED[argv[0]]}', file=sys.stderr)
        sys.exit(2)
    if argv in (['--version'], ['-V']):
        print(f'spec_mmdet {__version__}')
    elif argv in (['--help'], ['-h']):
        print(describe_usage())
    elif len(argv) == 2 and argv[0] == '--print-completion' and argv[1] in SHELLS:
        with command_line():
            print_completion(argv[1])
    elif argv:
        near = get_close_matches(argv[0], COMMANDS, 1)
        hint = f'did you mean {near[0]}?' if near else 'spec-mmdet --help lists the commands'
        print(f'error: no such command: {argv[0]}; {hint}', file=sys.stderr)
        sys.exit(2)
    else:
        print(describe_usage(), file=sys.stderr)
        sys.exit(2)


def describe_usage() -> str:
    """Return the help of ``spec-mmdet``, at most 80 columns wide."""
    width = max(map(len, COMMANDS))
    lines = ['usage: spec-mmdet COMMAND ...', '', 'spec-mmdet COMMAND --help lists the options of a command.']
    for title, commands in GROUPS.items():
        lines += ['', f'{title}:', *(f'  {name:{width}}  {line}' for name, line in commands.items())]
    options = {'--version': 'print the version', f'--print-completion {"|".join(SHELLS)}': ''}
    lines += ['', 'options:', *(f'  {name:{width}}  {line}'.rstrip() for name, line in options.items())]
    return '\n'.join([*lines, f'  {"":{width}}  print a script that completes commands, options and file names'])


def print_completion(shell: str) -> None:
    """Print a shell's script that completes the commands and their options.

    Raises:
        InputError: if shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise InputError('--print-completion: shtab is not installed. Run: pip install shtab') from error
    from .common import collect_parsers

    top = argparse.ArgumentParser('spec-mmdet')
    subparsers = top.add_subparsers()
    for name, line in COMMANDS.items():
        with collect_parsers() as parsers, suppress(SystemExit):
            import_module(f'.{name.replace("-", "_")}', __name__).main([])
        child = subparsers.add_parser(name, parents=parsers, add_help=False, help=line)
        for action in child._actions:
            if action.choices is None and action.nargs != 0:  # neither names nor flags
                action.complete = shtab.FILE
    print(shtab.complete(top, shell))
