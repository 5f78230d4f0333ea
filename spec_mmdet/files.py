"""Writing files so that nothing is lost: aside, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError


def aside_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f'.{path.name}.partial')


@contextmanager
def written_aside(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which takes the name of the file once it is whole and on the disk.

    Whatever happens, a file of that name is whole: the one that was there before, or the new one. Its folder is made.

    Raises:
        InputError: where it cannot be written, as on a disk that is full; nothing half-written is left then.
    """
    path = Path(path)
    aside = aside_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with aside.open('rb') as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    except OSError as error:
        raise InputError(
            f'{path}: could not be written ({error.strerror or error}); what was there is untouched'
        ) from error
    finally:
        with suppress(OSError):  # read-only, so that there is none
            aside.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | str) -> None:
    """Write a whole file; see :func:`written_aside`."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
