"""Reading checkpoints without running code from them, and refusing those that do not fit the model."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import torch
from mmengine.runner import CheckpointLoader
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InputError, list_briefly, prefix_errors
from .records import rebuild
from .safe_loading import explain_unpickling_error, weights_only

# Seconds that a server may be silent.
PATIENCE = 60

# How many times as large as the file its tensors may be.
SHARED = 16

# Instead of the config in a checkpoint, which MMEngine's DetInferencer would run if it is given none.
NO_CONFIG = 'raise ValueError("the config inside of a checkpoint is code, and is not run: name a config, too")'


def as_data(content: object, size: int | None = None) -> object:
    """What torch.load returned, with data for its records and without the texts that MMEngine would run as Python.

    Args:
        content: its tensors must be such as have room in the file.
        size: of the file, in bytes.
    """
    done: dict[int, tuple] = {}
    content = rebuild(content, done)
    # Names may share a tensor, but not so many; and what an old file did not write is memory that nobody has filled.
    if size is not None and sum(new.nbytes for _, new in done.values() if isinstance(new, Tensor)) > SHARED * size:
        raise InputError('holds tensors that are larger than the file')
    meta, hub = (content.get(key) for key in ('meta', 'message_hub')) if isinstance(content, dict) else (None, None)
    for key, part in (('meta', meta), ('message_hub', hub)):
        if not isinstance(part, dict | None):
            raise InputError(f'its "{key}" is a {type(part).__name__}, and not a dict')
    if isinstance(meta, dict):
        meta.pop('config', None)  # when it resumes
        if 'cfg' in meta:
            meta['cfg'] = NO_CONFIG
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if isinstance(info, dict):
        info.pop('cfg', None)
    return content


def local_file(path: str | Path) -> Path:
    """A file, or the copy of what an http(s) address holds: downloaded once, and kept where PyTorch keeps such files.

    Raises:
        InputError: if there is no such file, or the address gives none.
    """
    if '://' not in str(path):
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f'checkpoint {path}: no such file')
        return path
    address = str(path)
    # Files at two addresses may have the same name.
    name = f'{hashlib.sha256(address.encode()).hexdigest()[:8]}-{Path(urllib.request.url2pathname(address)).name}'
    copy = Path(torch.hub.get_dir()) / 'checkpoints' / name.partition('?')[0]
    if copy.is_file():
        print(f'checkpoint {address}: the copy that was downloaded before, {copy}')
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(address, timeout=PATIENCE) as answer,
            tempfile.NamedTemporaryFile(dir=copy.parent) as aside,
        ):
            shutil.copyfileobj(answer, aside)
            aside.flush()
            if answer.length:
                raise OSError(f'it ends {answer.length} bytes too early')
            os.link(aside.name, copy)
    except FileExistsError:
        pass  # another process was as fast
    except (OSError, ValueError) as error:
        raise InputError(f'checkpoint {address}: could not be downloaded ({error})') from error
    return copy


def fetch(path: str) -> str:
    """Return the local copy of an http(s) address, see :func:`local_file`, or any other path as it is."""
    return str(local_file(path)) if path.startswith(('http://', 'https://')) else path


def load(
    path: str | Path,
    map_location: str | torch.device | None = 'cpu',
    mmap: bool = False,
    trust_pickle: bool = False,
) -> object:
    """Read a checkpoint: tensors, plain containers and a few harmless records, never code.

    The text of a config in it is code, too: MMEngine runs it. It is left out.

    Args:
        path: a file written by ``torch.save``, or one of safetensors if its name ends so; or an address.
        map_location: as for ``torch.load``.
        mmap: map the tensors from disk instead of reading them.
        trust_pickle: run the code that the file may hold. It can do whatever you can.

    Raises:
        InputError: if the file does not exist, is not a checkpoint, is damaged, or would need code to be run.
    """
    if '://' in str(path) and not str(path).startswith(('http://', 'https://')):
        with prefix_errors(f'checkpoint {path}'):
            return as_data(CheckpointLoader.load_checkpoint(str(path), map_location))
    file = local_file(path)
    with prefix_errors(f'checkpoint {path}'):
        return _load(file, map_location, mmap, trust_pickle)


def _load(path: Path, map_location: str | torch.device | None, mmap: bool, trust_pickle: bool) -> object:
    try:
        if path.suffix == '.safetensors':
            return load_file(path, str(map_location or 'cpu'))
        is_zip = zipfile.is_zipfile(path)  # PyTorch wrote another format before 1.6
        size = path.stat().st_size
        if is_zip:
            entries = zipfile.ZipFile(path).infolist()
            # PyTorch never compresses; what is compressed, or read from one place many times, may be of any size.
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise InputError('not a checkpoint written by torch.save: it is compressed')
        if trust_pickle:
            return torch.load(path, map_location=map_location, weights_only=False, mmap=mmap and is_zip)
        with weights_only(strict=True):
            content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
            return as_data(content, size)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f'not a safetensors file, or damaged ({error})') from error
    except RecursionError as error:
        raise InputError('not a checkpoint: it is nested too deeply') from error
    except pickle.UnpicklingError as error:
        raise InputError(explain_unpickling_error(error)) from error
    except Exception as error:  # whatever an unpickler stumbles over in bytes that were not written by a pickler
        reason = str(error).partition('\n')[0].partition(' In PyTorch 2.6')[0][:200]  # which advises to run it
        raise InputError(f'not a checkpoint written by torch.save, or damaged ({reason})') from error


def is_state_dict(content: object) -> bool:
    """Whether this is a dict of tensors by their names, and not an empty one."""
    pairs = content.items() if isinstance(content, dict) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs)


def find_nonfinite(weights: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity."""
    return [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]


def get_state_dict(checkpoint: object, name: str) -> dict[str, Tensor]:
    """The weights in a checkpoint of MMEngine, or of weights alone, without the prefix of a parallel wrapper.

    Args:
        checkpoint: what :func:`load` returned.
        name: what to call it in the message.

    Raises:
        InputError: if there are none, or some are not finite.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else {}
    if not is_state_dict(weights):
        raise InputError(f'{name}: holds no weights of a detector: neither a "state_dict" nor weights alone')
    if spoilt := find_nonfinite(weights):
        raise InputError(f'{name}: its weights are not finite ({list_briefly(spoilt)}); an earlier one is to be taken')
    return {key.removeprefix('module.'): value for key, value in weights.items()}


def require_training_state(checkpoint: object, name: str) -> None:
    """Refuse a checkpoint that a training cannot go on from, with all that MMEngine takes from one.

    Args:
        checkpoint: what :func:`load` returned.
        name: what to call it in the message.

    Raises:
        InputError: where it lacks something, as one of weights alone does.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    meta, hub = (content.get(key) if isinstance(content.get(key), dict) else {} for key in ('meta', 'message_hub'))
    places = dict(epoch=meta.get('epoch'), iter=meta.get('iter'))
    places |= {key: meta.get(key, 0) for key in ('iter_in_epoch', 'iters_per_epoch')}
    lacking = [key for key, place in places.items() if type(place) is not int or not 0 <= place < 2**31]
    lacking += [key for key in ('log_scalars', 'runtime_info', 'resumed_keys') if not isinstance(hub.get(key), dict)]
    lacking += [] if isinstance(content.get('optimizer'), dict) else ['optimizer']
    lacking += [] if isinstance(content.get('param_schedulers', []), list | dict) else ['param_schedulers']
    lacking += [] if is_state_dict(content.get('gradients', {'': torch.empty(0)})) else ['gradients']
    if lacking:
        raise InputError(f'{name}: no training can be resumed from it, it lacks {", ".join(lacking)}; to start a new '
                         'one from its weights: --cfg-options load_from=FILE')  # fmt: skip


def get_classes(checkpoint: object) -> list[str] | None:
    """The names of the classes that MMEngine's training wrote into a checkpoint; None where there are none."""
    found = checkpoint
    for key in ('meta', 'dataset_meta', 'classes'):
        found = found.get(key) if isinstance(found, dict) else None
    named = isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found)
    return list(found) if named else None


def get_run_info(checkpoint: object) -> dict[str, object]:
    """What a training of this package says of itself in its checkpoints (``run.json``); empty where it says nothing."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    run = meta.get('run') if isinstance(meta, dict) else None
    return run if isinstance(run, dict) else {}


def describe_mismatches(model: nn.Module, weights: dict[str, Tensor], part: str = '') -> str:
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
        'of another kind of number': [
            k for k in own if k in theirs and own[k].is_floating_point() != theirs[k].is_floating_point()
        ],
    }
    return '; '.join(
        f'{len(names)} {fault} ({", ".join(names[:3])}{", ..." if len(names) > 3 else ""})'
        for fault, names in faults.items()
        if names
    )
