"""Reading checkpoints without running code from them, and refusing those that do not fit the model."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError


def _history_buffer_method(owner: type, name: str):
    """Stand in for getattr, which MMEngine's pickled HistoryBuffer uses to name its own four statistics."""
    if owner is HistoryBuffer and name in ('min', 'max', 'mean', 'current'):
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f'getattr({owner}, {name!r}) is not a statistic of HistoryBuffer')


# What checkpoints hold beside tensors and plain containers: MMEngine's the histories of its logged scalars, XCiT's the
# arguments of its training script. None of these runs code of the file's choosing.
_SAFE_GLOBALS = [
    argparse.Namespace,
    HistoryBuffer,
    (_history_buffer_method, 'builtins.getattr'),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.int64)),
    *(
        (function, f'{module}.multiarray.{function.__name__}')
        for module in ('numpy.core', 'numpy._core')  # as NumPy 1 and NumPy 2 write it
        for function in (np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0])
    ),
]


def load(
    path: str | Path,
    map_location: str | torch.device | None = 'cpu',
    mmap: bool = False,
    trust_pickle: bool = False,
) -> object:
    """Read a checkpoint: tensors, plain containers and a few harmless records, never code.

    Args:
        path: a file written by ``torch.save``, or one of safetensors if its name ends so; or an address.
        map_location: as for ``torch.load``.
        mmap: map the tensors from disk instead of reading them.
        trust_pickle: run the code that the file may hold. It can do whatever you can.

    Raises:
        InputError: if the file does not exist, is not a checkpoint, is damaged, or would need code to be run.
    """
    if '://' in str(path):
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return CheckpointLoader.load_checkpoint(str(path), map_location)
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f'checkpoint {path}: no such file')
    try:
        if path.suffix == '.safetensors':
            return load_file(path, str(map_location or 'cpu'))
        mmap = mmap and zipfile.is_zipfile(path)  # PyTorch wrote another format before 1.6
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location=map_location, weights_only=not trust_pickle, mmap=mmap)
    except SafetensorError as error:
        raise InputError(f'checkpoint {path}: not a safetensors file, or damaged ({error})') from error
    except pickle.UnpicklingError as error:
        if 'Unsupported global' in str(error) or 'was not an allowed global' in str(error):
            what = str(error).split('GLOBAL ', 1)[-1].split(' was not', 1)[0]
            raise InputError(
                f'checkpoint {path}: holds {what}, which only running code from the file could read; it was not run. '
                'Save it again with nothing but tensors and plain containers in it, or, if you trust whoever made it, '
                'convert it with spec-mmdet convert --trust-pickle.'
            ) from error
        raise InputError(f'checkpoint {path}: not a checkpoint written by torch.save, or damaged') from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f'checkpoint {path}: not a checkpoint written by torch.save, or damaged ({error})') from error


@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: str | torch.device | None = None) -> object:
    """MMEngine's loader for files: its own cannot read its own checkpoints with weights_only, or reads without it."""
    return load(filename, map_location)


def state_dict_of(checkpoint: object, name: str) -> dict[str, Tensor]:
    """The weights in a checkpoint of MMEngine, or of weights alone, without the prefix of a parallel wrapper.

    Args:
        checkpoint: what :func:`load` returned.
        name: what to call it in the message.

    Raises:
        InputError: if there are none.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else {}
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f'{name}: holds no weights of a detector: neither a "state_dict" nor weights alone')
    return {key.removeprefix('module.'): value for key, value in weights.items()}


def classes_of(checkpoint: object) -> list[str] | None:
    """The names of the classes that MMEngine's training wrote into a checkpoint; None where there are none."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    classes = ((meta or {}).get('dataset_meta') or {}).get('classes')
    return list(classes) if classes else None


def mismatches(model: nn.Module, weights: dict[str, Tensor], part: str = '') -> str:
    """Say how weights do not fit a model: which are missing, not known, or of another shape; '' where they fit.

    Args:
        model: the model as it is configured.
        weights: its would-be state dict.
        part: compare only names that begin so.
    """
    own = {k.removeprefix('module.'): v for k, v in model.state_dict().items()}
    own = {k: v for k, v in own.items() if k.startswith(part)}
    theirs = {k: v for k, v in weights.items() if k.startswith(part)}
    faults = {
        'missing': [k for k in own if k not in theirs and not k.endswith('num_batches_tracked')],
        'unknown': [k for k in theirs if k not in own],
        'of another shape': [k for k in own if k in theirs and own[k].shape != theirs[k].shape],
    }
    return '; '.join(
        f'{len(names)} {fault} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
        for fault, names in faults.items()
        if names
    )
