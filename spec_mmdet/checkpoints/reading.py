"""Read checkpoints without running code from them, and check that they fit the model."""

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
from .safe_loading import explain_unpickling_error, force_weights_only

INTACT = 'Use an intact checkpoint'  # advice for a file that cannot be read
PATIENCE = 60  # timeout of a download, in seconds
SHARED = 16  # maximum size of the tensors relative to the file: names may share a tensor

# Replaces the config in a checkpoint, which MMEngine's DetInferencer would run if no other config is given.
NO_CONFIG = 'raise ValueError("the config in a checkpoint is code and is not run: pass a config file")'


def convert_to_data(content: object, size: int | None = None) -> object:
    """Return the result of torch.load with its records as plain data and without the configs that MMEngine would run.

    The tensors must fit into ``size``, the file's size in bytes.
    """
    done: dict[int, tuple] = {}
    content = rebuild(content, done)
    # Guards against tensors that expand a small storage, and against storages that the file does not contain.
    if size is not None and sum(new.nbytes for _, new in done.values() if isinstance(new, Tensor)) > SHARED * size:
        raise InputError('contains tensors that are larger than the file')
    meta, hub = (content.get(key) for key in ('meta', 'message_hub')) if isinstance(content, dict) else (None, None)
    for key, part in (('meta', meta), ('message_hub', hub)):
        if not isinstance(part, dict | None):
            raise InputError(f'its "{key}" is a {type(part).__name__} instead of a dict')
    if isinstance(meta, dict):
        meta.pop('config', None)  # MMEngine would run it when resuming
        if 'cfg' in meta:
            meta['cfg'] = NO_CONFIG
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if isinstance(info, dict):
        info.pop('cfg', None)
    return content


def fetch_file(path: str | Path) -> Path:
    """Return the path of a file; download an http(s) URL once into PyTorch's cache of checkpoints.

    Raises:
        InputError: if the file does not exist, or the download fails.
    """
    if '://' not in str(path):
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f'checkpoint {path}: no such file')
        return path
    address = str(path)
    # The digest distinguishes files of the same name.
    name = f'{hashlib.sha256(address.encode()).hexdigest()[:8]}-{Path(urllib.request.url2pathname(address)).name}'
    copy = Path(torch.hub.get_dir()) / 'checkpoints' / name.partition('?')[0]
    if copy.is_file():
        print(f'checkpoint {address}: using the cached copy {copy}')
        return copy
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with (
            urllib.request.urlopen(address, timeout=PATIENCE) as response,
            tempfile.NamedTemporaryFile(dir=copy.parent) as temporary,
        ):
            shutil.copyfileobj(response, temporary)
            temporary.flush()
            if response.length:
                raise OSError(f'it ends {response.length} bytes too early')
            os.link(temporary.name, copy)
    except FileExistsError:
        pass  # another process downloaded it meanwhile
    except (OSError, ValueError) as error:
        raise InputError(f'checkpoint {address}: could not be downloaded ({error})') from error
    return copy


def fetch(path: str) -> str:
    """Return the local copy of an http(s) URL (:func:`fetch_file`); any other path is unchanged."""
    return str(fetch_file(path)) if path.startswith(('http://', 'https://')) else path


def load(
    path: str | Path, map_location: str | torch.device | None = 'cpu', mmap: bool = False, trust_pickle: bool = False
) -> object:
    """Read a checkpoint: tensors, plain containers and a few harmless records, without running code.

    A config in the checkpoint is left out, because MMEngine would run it.

    Args:
        path: a file written by ``torch.save``, a .safetensors file, or a URL.
        map_location: as for ``torch.load``.
        mmap: map the tensors from disk instead of reading them.
        trust_pickle: run code that the file may contain, with all rights of the user.

    Raises:
        InputError: if the file does not exist, is not a checkpoint, is corrupt, or cannot be read without running code.
    """
    if '://' in str(path) and not str(path).startswith(('http://', 'https://')):
        with prefix_errors(f'checkpoint {path}', INTACT):
            return convert_to_data(CheckpointLoader.load_checkpoint(str(path), map_location))
    file = fetch_file(path)
    with prefix_errors(f'checkpoint {path}', INTACT):
        return _load(file, map_location, mmap, trust_pickle)


def _load(path: Path, map_location: str | torch.device | None, mmap: bool, trust_pickle: bool) -> object:
    try:
        if path.suffix == '.safetensors':
            return load_file(path, str(map_location or 'cpu'))
        is_zip = zipfile.is_zipfile(path)  # PyTorch before 1.6 wrote a different format
        size = path.stat().st_size
        if is_zip:
            entries = zipfile.ZipFile(path).infolist()
            # PyTorch never compresses. Compressed or overlapping entries could expand to any size.
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > size:
                raise InputError('not a checkpoint written by torch.save: it is compressed')
        if trust_pickle:
            return torch.load(path, map_location=map_location, weights_only=False, mmap=mmap and is_zip)
        with force_weights_only(strict=True):
            content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap and is_zip)
            return convert_to_data(content, size)
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f'not a safetensors file, or corrupt ({error})') from error
    except RecursionError as error:
        raise InputError('not a checkpoint: it is nested too deeply') from error
    except pickle.UnpicklingError as error:
        raise InputError(explain_unpickling_error(error)) from error
    except Exception as error:  # an unpickler raises errors of any type for invalid bytes
        reason = str(error).partition('\n')[0].partition(' In PyTorch 2.6')[0][:200]  # cut the advice to run code
        raise InputError(f'not a checkpoint written by torch.save, or corrupt ({reason})') from error


def is_state_dict(content: object) -> bool:
    """Return whether this is a non-empty dict of tensors by name."""
    pairs = content.items() if isinstance(content, dict) else ()
    return bool(pairs) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs)


def find_nonfinite(weights: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that contain NaN or infinity."""
    return [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]


def get_state_dict(checkpoint: object, name: str) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of MMEngine or a plain state dict, without the prefix of DDP.

    Counts of batches are integers again where a script that averages checkpoints has made them floats.

    Raises:
        InputError: if there are no weights, or they contain NaN or infinity; ``name`` is the checkpoint's.
    """
    weights = checkpoint.get('state_dict', checkpoint) if isinstance(checkpoint, dict) else {}
    if not is_state_dict(weights):
        raise InputError(f'{name}: contains no weights: neither a "state_dict" nor a plain state dict. Use the '
                         'checkpoint of a detector')  # fmt: skip
    if nonfinite := find_nonfinite(weights):
        raise InputError(f'{name}: weights contain NaN or inf ({list_briefly(nonfinite)}). Use an earlier checkpoint')
    return {
        key.removeprefix('module.'): value.long() if key.endswith('num_batches_tracked') else value
        for key, value in weights.items()
    }


def require_training_state(checkpoint: object, name: str) -> None:
    """Raise an InputError if a checkpoint lacks something that MMEngine needs to resume training."""
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
        raise InputError(f'{name}: training cannot resume from it, because it lacks {", ".join(lacking)}. Start a new '
                         'training from its weights with --cfg-options load_from=FILE')  # fmt: skip


def verify_checkpoint(path: str | Path, resume: bool = False) -> dict:
    """Read a detector's checkpoint, and check its weights and, to ``resume``, its training state.

    Raises:
        InputError: if it cannot be read, is not a detector's, or lacks the state for resuming.
    """
    content = load(path, mmap=True)
    get_state_dict(content, f'checkpoint {path}')
    if resume:
        require_training_state(content, f'checkpoint {path}')
    return content


def get_classes(checkpoint: object) -> list[str] | None:
    """Return the class names that MMEngine stored in a checkpoint, or None."""
    found = checkpoint
    for key in ('meta', 'dataset_meta', 'classes'):
        found = found.get(key) if isinstance(found, dict) else None
    named = isinstance(found, list | tuple) and found and all(isinstance(name, str) for name in found)
    return list(found) if named else None


def get_run_info(checkpoint: object) -> dict[str, object]:
    """Return the run metadata that this package stores in its checkpoints (``run.json``), or an empty dict."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    run = meta.get('run') if isinstance(meta, dict) else None
    return run if isinstance(run, dict) else {}


def describe_state(checkpoint: object) -> dict[str, object]:
    """Return the state of a checkpoint's weights.

    Returns:
        ``sha256``: digest of the tensors; ``position``: of the training, as text; ``epoch`` (or iteration, without
        epochs): None within an epoch or if unknown; ``averaged``: whether the weights are moving averages; ``seed``.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    meta, run = content.get('meta') or {}, get_run_info(content)
    digest = hashlib.sha256()
    for name, value in sorted(get_state_dict(content, 'checkpoint').items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    epoch, iteration, within = (meta.get(key) for key in ('epoch', 'iter', 'iter_in_epoch'))
    position = f'after epoch {epoch}' if epoch else f'after iteration {iteration}' if iteration else 'unknown'
    if within:
        position, epoch, iteration = f'after iteration {iteration}, within epoch {epoch + 1}', None, None
    averaged = 'ema_state_dict' in content
    return dict(
        sha256=digest.hexdigest(),
        position=position + ', moving averages' * averaged,
        epoch=epoch or iteration,
        averaged=averaged,
        seed=run.get('seed'),
    )


def describe_mismatches(model: nn.Module, weights: dict[str, Tensor], part: str = '') -> str:
    """Describe missing and unknown tensors and wrong shapes of a model's weights; '' if they fit.

    Only names that begin with ``part`` are compared. A second name of a known tensor, which DDQ adds in training, is
    not unknown.
    """
    own = {k.removeprefix('module.'): v for k, v in model.state_dict().items()}
    own = {k: v for k, v in own.items() if k.startswith(part)}
    theirs = {k: v for k, v in weights.items() if k.startswith(part)}
    known = {v.data_ptr() for k, v in theirs.items() if k in own} - {0}
    faults = {
        'missing': [k for k in own if k not in theirs and not k.endswith('num_batches_tracked')],
        'unknown': [k for k, v in theirs.items() if k not in own and v.data_ptr() not in known],
        'with a wrong shape': [k for k in own if k in theirs and own[k].shape != theirs[k].shape],
        'with a wrong dtype': [
            k for k in own if k in theirs and own[k].is_floating_point() != theirs[k].is_floating_point()
        ],
    }
    return '; '.join(f'{len(names)} {fault} ({list_briefly(names)})' for fault, names in faults.items() if names)
