"""Choose the checkpoint from which a training resumes, and reserve a work directory for one training."""

from __future__ import annotations

import errno
import glob
import os
import platform
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..checkpoints.reading import verify_checkpoint
from ..compat import get_load_path
from ..configs import is_kind_of
from ..errors import InputError, list_briefly
from ..files import LEFTOVERS
from .saving import INTERRUPTED

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # errors of file systems without locks


def find_checkpoints(folder: Path, cfg: Config | None = None) -> list[Path]:
    """Find the checkpoints of a training: of epochs, of iterations, and the one saved on a signal.

    Args:
        folder: the work directory.
        cfg: the config, whose checkpoint hooks may have another folder (``out_dir``) and other names
            (``filename_tmpl``). Files with MMEngine's default names are found in any case.
    """
    folders, templates = {folder}, {'epoch_{}.pth', 'iter_{}.pth', INTERRUPTED}
    hooks = [*((cfg or {}).get('default_hooks') or {}).values(), *((cfg or {}).get('custom_hooks') or [])]
    for hook in hooks:
        if isinstance(hook, dict) and is_kind_of(hook, HOOKS, CheckpointHook):
            work = os.path.abspath(folder)
            if hook.get('out_dir') and hook['out_dir'] != work:
                folders.add(Path(hook['out_dir'], os.path.basename(work)))  # MMEngine's convention
            templates.add(hook.get('filename_tmpl') or INTERRUPTED)
    return sorted({path for place in folders for template in templates for path in match_template(place, template)})


def match_template(folder: Path, template: str) -> Iterator[Path]:
    """Yield the files in a folder whose names are a format string filled with a number."""
    parts = re.split(r'\{[^}]*\}', template)
    name = re.compile(r'\d+'.join(map(re.escape, parts)))
    for path in folder.glob('*'.join(map(glob.escape, parts))):
        if name.fullmatch(path.relative_to(folder).as_posix()):
            yield path


def read_iteration(path: Path) -> int:
    """Verify a checkpoint and return the iteration after which it was saved.

    Raises:
        InputError: if it is corrupt, or a training cannot resume from it.
    """
    content = verify_checkpoint(path, resume=True)
    if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
        raise InputError(f'checkpoint {path}: corrupt in {damaged}. Use an earlier one')
    return content['meta']['iter']


def find_newest_checkpoint(folder: Path, cfg: Config | None = None) -> Path | None:
    """Return the intact checkpoint with the most iterations; print which it is, and which ones are corrupt.

    See :func:`find_checkpoints` for the arguments.

    Raises:
        InputError: if there are checkpoints and all are corrupt.
    """
    intact, faults = {}, []
    for path in find_checkpoints(folder, cfg):
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
            f'{folder}: all {len(faults)} checkpoints are corrupt; training was not started. Use another --work-dir'
        )
    print(f'{folder}: contains no checkpoint; training starts')
    return None


def require_no_checkpoints(folder: Path, cfg: Config | None = None) -> None:
    """Check that a training has no checkpoints, which a new one would overwrite.

    See :func:`find_checkpoints` for the arguments.

    Raises:
        InputError: if there are some.
    """
    if paths := find_checkpoints(folder, cfg):
        names = list_briefly([path.name for path in paths])
        raise InputError(
            f'{paths[0].parent}: contains a training already ({names}). Continue it with --resume, or use another '
            '--work-dir'
        )


def explain_resume_errors(runner: Runner) -> None:
    """Turn every exception that MMEngine raises for a checkpoint's training state into a one-line InputError."""
    load_or_resume = runner.load_or_resume

    def load_or_explain() -> None:
        try:
            load_or_resume()
        except (InputError, OSError):
            raise
        except Exception as error:
            reason = f'{type(error).__name__}: {error}'.partition('\n')[0][:200]
            advice = 'Use an earlier one'
            if 'parameter group' in reason:
                advice = (
                    'The optimiser has other parameters: resume with the same frozen layers, paramwise_cfg and '
                    '--preset, or start a new training from its weights with --cfg-options load_from=FILE'
                )
            raise InputError(
                f'checkpoint {get_load_path(runner)}: training cannot resume from it ({reason}). {advice}'
            ) from error

    runner.load_or_resume = load_or_explain


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create and lock a work directory for one training; remove temporary files of killed trainings.

    On a file system without locks, print a warning instead.

    Raises:
        InputError: if another training holds the lock, or the directory cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / '.lock').open('a+')
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({error.strerror}). Use another --work-dir') from error
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
                    'use another --work-dir'
                ) from error
            print(f'warning: {folder}: cannot be locked ({error.strerror}). Start no other training with this '
                  '--work-dir.', file=sys.stderr)  # fmt: skip
        for left in folder.glob(LEFTOVERS):
            left.unlink()
        lock.truncate(0)
        with suppress(OSError):  # a full disk
            os.write(lock.fileno(), f'process {os.getpid()} on {platform.node()}'.encode())
        yield
