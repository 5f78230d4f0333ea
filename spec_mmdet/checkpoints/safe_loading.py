"""Have MMEngine load checkpoints without running code from them: ``CheckpointLoader`` reads weights only.

This module replaces MMEngine's loaders. Importing the package changes one other thing of others: ``mmcv._ext``,
where mmcv has none. MMEngine 0.10.7 cannot read its own checkpoints since PyTorch 2.6, and its fork falls back to
running whatever code is in a file. The loaders here return what MMEngine returns for a file without code.
"""

from __future__ import annotations

import functools
import os
import pathlib
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as loaders

from ..compat import known_globals, use_globals
from ..errors import InputError
from .records import STAND_INS, rebuild

FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'

# Data that PyTorch does not know.
PLAIN = {'builtins.slice': slice, 'builtins.range': range, 'builtins.frozenset': frozenset}
PLAIN |= {f'{module}.PosixPath': pathlib.PosixPath for module in ('pathlib', 'pathlib._local')}


@contextmanager
def weights_only(strict: bool = False) -> Iterator[None]:
    """Run no code of a file that torch.load reads within, whoever calls it, with whatever arguments.

    Args:
        strict: whether a file may name only :data:`STAND_INS`, which cannot take all memory, and not all that PyTorch
            allows.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = '1'
    try:
        with use_globals(STAND_INS if strict else STAND_INS | PLAIN | known_globals()):
            yield
    finally:
        os.environ.pop(FORCE) if before is None else os.environ.update({FORCE: before})


def explain_unpickling_error(error: pickle.UnpicklingError) -> str:
    """Return one line on why a file cannot be read without running code."""
    refused = re.search(r'GLOBAL (\S+)', str(error))
    if not refused:
        return 'not a checkpoint written by torch.save, or damaged'
    return (
        f'contains {refused[1]}, which only running code from the file could read; it was not run. Save it again with '
        'nothing but tensors and plain containers in it, or, if you trust whoever made it, convert it with '
        '"spec-mmdet convert --trust-pickle"'
    )


def load_weights_only(loader: Callable[..., object]) -> Callable[..., object]:
    """Wrap one of MMEngine's loaders, which call torch.load."""

    @functools.wraps(loader)
    def load(filename: str, map_location: str | torch.device | None = None) -> object:
        with weights_only():
            try:
                return rebuild(loader(filename, map_location), {}, strict=False)
            except pickle.UnpicklingError as error:
                raise InputError(f'checkpoint {filename}: {explain_unpickling_error(error)}') from error

    return load


# MMEngine's prefixes with its loaders.
for _prefixes, _loader in {
    ('',): loaders.load_from_local,
    ('http://', 'https://'): loaders.load_from_http,
    ('open-mmlab://', 'openmmlab://'): loaders.load_from_openmmlab,
    ('modelzoo://', 'torchvision://'): loaders.load_from_torchvision,
    ('mmcls://',): loaders.load_from_mmcls,
    ('pavi://',): loaders.load_from_pavi,
    (r'(\S+\:)?s3://', r'(\S+\:)?petrel://'): loaders.load_from_ceph,
}.items():
    CheckpointLoader.register_scheme(_prefixes, load_weights_only(_loader), force=True)
