"""Choose the checkpoint from which a training resumes, and reserve a work directory for one training."""

from __future__ import annotations

import errno
import os
import platform
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.runner import Runner

from ..checkpoints.reading import get_state_dict, load, require_training_state
from ..compat import get_load_path
from ..errors import InputError, list_briefly
from ..files import LEFTOVERS
from .saving import INTERRUPTED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks


def find_checkpoints(folder: Path) -> list[Path]:
    """Find the checkpoints in a work directory: of epochs, of iterations, and the one saved on a signal."""
    return sorted(path for name in ('epoch_*.pth', 'iter_*.pth', INTERRUPTED) for path in folder.glob(name))


def read_iteration(path: Path) -> int:
    """Verify a checkpoint and return the iteration after which it was saved.

    Raises:
        InputError: if it is corrupt, or a training cannot resume from it.
    """
    content = load(path, mmap=True)
    get_state_dict(content, f'checkpoint {path}')
    require_training_state(content, f'checkpoint {path}')
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise InputError(f'checkpoint {path}: corrupt in {damaged}')
    return content['meta']['iter']


def find_newest_checkpoint(folder: Path) -> Path | None:
    """Return the intact checkpoint with the most iterations; print which it is, and which ones are corrupt.

    Raises:
        InputError: if there are checkpoints and all are corrupt.
    """
    intact, faults = {}, []
    for path in find_checkpoints(folder):
        try:
            intact[path] = read_iteration(path)
        except InputError as error:
            faults.append(str(error))
    for fault in faults:
        print(f'skipped: {fault}')
    if intact:
        newest = max(intact, key=intact.__getitem__)
        print(f'resuming from {newest}, saved after iteration {intact[newest]}')
        return newest
    if faults:
        raise InputError(
            f'{folder}: all {len(faults)} checkpoints are corrupt; training was not started. Use another --work-dir.'
        )
    print(f'{folder}: no checkpoint to resume from; training starts')
    return None


def require_no_checkpoints(folder: Path) -> None:
    """Check that a work directory holds no checkpoints, which a new training would overwrite.

    Raises:
        InputError: if there are some.
    """
    if names := [path.name for path in find_checkpoints(folder)]:
        raise InputError(
            f'{folder}: holds a training already ({list_briefly(names)}). Continue it with --resume, or '
            'use another --work-dir.'
        )


def explain_resume_errors(runner: Runner) -> None:
    """Turn every exception that MMEngine raises for a checkpoint's training state into a one-line InputError."""
    load_or_resume = runner.load_or_resume

    def load_or_resume_or_say_why() -> None:
        try:
            load_or_resume()
        except (InputError, OSError):
            raise
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'.partition('\n')[0][:200]
            raise InputError(
                f'checkpoint {get_load_path(runner)}: training cannot resume from it ({reason})'
            ) from error

    runner.load_or_resume = load_or_resume_or_say_why


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a work directory, which is created, for one training; remove temporary files that a killed one left.

    On a file system without locks it prints a warning instead.

    Raises:
        InputError: if another training holds the lock, or the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / '.lock').open('a+')
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({error.strerror})') from error
    with lock:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, 'fcntl is not available')
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.seek(0)
                raise InputError(
                    f'{folder}: another training is writing there ({lock.read() or "unknown"}). Wait for its end, or '
                    'use another --work-dir.'
                ) from error
            print(f'warning: {folder}: cannot be locked ({error.strerror}). Start no other training with this '
                  '--work-dir.', file=sys.stderr)  # fmt: skip
        for left in folder.glob(LEFTOVERS):
            left.unlink()
        lock.truncate(0)
        with suppress(OSError):  # a full disk
            os.write(lock.fileno(), f'process {os.getpid()} on {platform.node()}'.encode())
        yield
