"""Which checkpoint a training goes on from, and that no two trainings write to one directory."""

from __future__ import annotations

import fcntl
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.runner import Runner

from ..checkpoints.reading import get_state_dict, load, require_training_state
from ..errors import InputError, list_briefly
from ..files import LEFTOVERS
from .saving import INTERRUPTED


def find_checkpoints(folder: Path) -> list[Path]:
    """What a training has saved to go on from: at the end of epochs, by iterations, or on a signal."""
    return sorted(path for name in ('epoch_*.pth', 'iter_*.pth', INTERRUPTED) for path in folder.glob(name))


def read_iteration(path: Path) -> int:
    """The iteration after which a whole checkpoint was saved.

    Raises:
        InputError: where a training cannot go on from it.
    """
    content = load(path, mmap=True)
    get_state_dict(content, f'checkpoint {path}')
    require_training_state(content, f'checkpoint {path}')
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise InputError(f'checkpoint {path}: damaged in {damaged}')
    return content['meta']['iter']


def find_newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to resume from: of those that are whole the one trained longest; says which, and what is not.

    Raises:
        InputError: where there are checkpoints and none is whole.
    """
    whole, broken = {}, []
    for path in find_checkpoints(folder):
        try:
            whole[path] = read_iteration(path)
        except InputError as error:
            broken.append(str(error))
    for fault in broken:
        print(f'passed over: {fault}')
    if whole:
        newest = max(whole, key=whole.__getitem__)
        print(f'resuming from {newest}, saved after iteration {whole[newest]}')
        return newest
    if broken:
        raise InputError(f'{folder}: none of its {len(broken)} checkpoints is whole, and nothing was started over them')
    print(f'{folder}: no checkpoint to resume from; the training starts')
    return None


def require_no_checkpoints(folder: Path) -> None:
    """Refuse to start a training over another one's checkpoints.

    Raises:
        InputError: where there are some.
    """
    if names := [path.name for path in find_checkpoints(folder)]:
        raise InputError(
            f'{folder}: holds a training already ({list_briefly(names)}): --resume goes on with it, another --work-dir '
            'leaves it alone'
        )


def explain_resume_errors(runner: Runner) -> None:
    """Have whatever MMEngine stumbles over in a checkpoint's training state be an error of one line."""
    load_or_resume = runner.load_or_resume

    def load_or_resume_or_say_why() -> None:
        try:
            load_or_resume()
        except (InputError, OSError):
            raise
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'.partition('\n')[0][:200]
            raise InputError(f'checkpoint {runner._load_from}: no training can go on from it ({reason})') from error

    runner.load_or_resume = load_or_resume_or_say_why


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a work directory for one training; what another one left half-written is removed.

    Raises:
        InputError: where a training holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / '.lock').open('a+')
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({error.strerror})') from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            raise InputError(f'{folder}: another training is writing there ({lock.read() or "unknown"})') from error
        for left in folder.glob(LEFTOVERS):
            left.unlink()
        lock.truncate(0)
        with suppress(OSError):  # on a full disk the holder has no name
            os.write(lock.fileno(), f'process {os.getpid()} on {os.uname().nodename}'.encode())
        yield
