"""Replace MMEngine's checkpoint loaders (``CheckpointLoader``) by loaders that run no code from a file.

MMEngine 0.10.7 cannot read its own checkpoints since PyTorch 2.6, and its fork falls back to running any code in a
file. For a file without code, these loaders return the same as MMEngine's.
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
from safetensors.torch import load_file

from ..compat import list_known_globals, use_globals
from ..errors import InputError
from .records import STAND_INS, rebuild

FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'

# Harmless types that PyTorch does not allow.
PLAIN = {'builtins.slice': slice, 'builtins.range': range, 'builtins.frozenset': frozenset}
PLAIN |= {f'{module}.PosixPath': pathlib.PosixPath for module in ('pathlib', 'pathlib._local')}


@contextmanager
def force_weights_only(strict: bool = False) -> Iterator[None]:
    """Force weights-only loading for every torch.load in this context, whatever its arguments.

    Args:
        strict: whether a file may use only the names in :data:`STAND_INS`, instead of all that PyTorch allows.
    """
    before = os.environ.get(FORCE)
    os.environ[FORCE] = '1'
    try:
        with use_globals(STAND_INS if strict else STAND_INS | PLAIN | list_known_globals()):
            yield
    finally:
        os.environ.pop(FORCE) if before is None else os.environ.update({FORCE: before})


def explain_unpickling_error(error: pickle.UnpicklingError) -> str:
    """Return one line on why a file cannot be read without running code."""
    refused = re.search(r'GLOBAL (\S+)', str(error))
    if not refused:
        return 'not a checkpoint written by torch.save, or corrupt'
    return (
        f'contains {refused[1]}, which can only be read by running code from the file; it was not run. Save it again '
        'with only tensors and plain containers or, if you trust its author, run "spec-mmdet convert --trust-pickle"'
    )


def load_weights_only(loader: Callable[..., object]) -> Callable[..., object]:
    """Wrap one of MMEngine's loaders so that it loads weights only, of safetensors, too."""

    @functools.wraps(loader)
    def load(filename: str, map_location: str | torch.device | None = None) -> object:
        if str(filename).endswith('.safetensors') and os.path.isfile(filename):
            return dict(state_dict=load_file(filename, str(map_location or 'cpu')))
        with force_weights_only():
            try:
                return rebuild(loader(filename, map_location), {}, strict=False)
            except pickle.UnpicklingError as error:
                raise InputError(f'checkpoint {filename}: {explain_unpickling_error(error)}') from error

    return load


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
