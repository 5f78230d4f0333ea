"""The commands: ``spec-mmdet NAME``, one module each, with a ``main``."""

from __future__ import annotations

import locale
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from .. import __version__
from ..errors import InputError

COMMANDS = {
    'demo': 'the whole way on generated data, from images to COCO AP, in minutes on a CPU',
    'prepare': 'check a data set before training on it, split it, or take a part of it',
    'train': 'train a detector',
    'pretrain': 'train a classifier, for a backbone to start from',
    'test': 'evaluate a detector: COCO AP, a page with the results',
    'predict': 'find objects in images, folders and videos',
    'convert': 'convert a checkpoint of XCiT from any layout there is, or back',
    'export': 'write a detector, or its backbone alone, as ONNX',
    'publish': 'a folder for others: weights alone, config, model card, checksums',
    'compare': 'several trainings: AP over seeds, differences and their noise, curves',
    'analyze': "condition numbers of a backbone's projections and of its attention's Jacobians",
    'benchmark': "time and memory against timm's XCiT and others",
    'gpu-check': 'everything that only a GPU shows: what is right on it, and how fast it is',
    'flops': 'parameters and multiply-adds of configs',
}

# Commands of earlier versions, and what to run instead of them.
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
    'OpenCV lacks a library of the system. The one without windows needs none: pip uninstall opencv-python, '
    'then pip install --force-reinstall --no-deps opencv-python-headless. Or, as root: apt-get install libgl1'
)


@contextmanager
def command_line() -> Iterator[None]:
    """What every command runs in: one line on stderr and exit status 1 for an InputError, or a config that cannot be
    built; no pickle is trusted.
    """
    # MMEngine's use of pkg_resources is nothing that its user could put right.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    if locale.getpreferredencoding(False).lower().replace('-', '') != 'utf8' and not sys.flags.utf8_mode:
        # Names of files and classes would stop the run, in MMEngine's logs if nowhere else.
        os.execv(sys.executable, [sys.executable, '-X', 'utf8', *sys.orig_argv[1:]])
    if os.environ.get('MPLBACKEND', '').startswith('module://'):
        del os.environ['MPLBACKEND']  # a notebook's, which belongs to its own environment
    # Whatever scheme a checkpoint is loaded by.
    os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    try:
        yield
    except InputError as error:
        sys.exit(f'error: {error}')
    except Exception as error:
        if isinstance(error, ImportError) and 'libGL' in str(error):
            sys.exit(f'error: {NO_LIBGL} ({error})')
        from .options import explain_config_error

        if (fault := explain_config_error(error)) is None:
            raise
        sys.exit(f'error: {fault}')
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it for a command that Ctrl-C ended


def run(command: str, argv: Sequence[str] | None = None) -> None:
    """Run a command of :data:`COMMANDS`; ends the process, with one line on stderr, where its input cannot be used.

    Args:
        command: its name.
        argv: its arguments; by default those of the process.
    """
    with command_line():
        import_module('..registered', __name__)
        import_module(f'.{command.replace("-", "_")}', __name__).main(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """``spec-mmdet [--help | --version | COMMAND ...]``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        run(argv[0], argv[1:])
        return
    if argv and argv[0] in REMOVED:
        print(f'error: spec-mmdet {argv[0]} was removed; use {REMOVED[argv[0]]}', file=sys.stderr)
        sys.exit(2)
    width = max(map(len, COMMANDS))
    usage = 'usage: spec-mmdet COMMAND ... (spec-mmdet COMMAND --help tells its options)\n\n' + '\n'.join(
        f'  {name:{width}}  {line}' for name, line in COMMANDS.items()
    )
    if argv in (['--version'], ['-V']):
        print(f'spec_mmdet {__version__}')
    elif argv in (['--help'], ['-h']):
        print(usage)
    else:
        print(usage, file=sys.stderr)
        if argv:
            print(f'\nerror: no such command: {argv[0]}', file=sys.stderr)
        sys.exit(2)
