"""Write files and folders atomically: to a temporary file that is flushed to disk, then renamed."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

PARTIAL = '.partial'  # temporary folder within the folder that is written
LEFTOVERS = '.*.partial'  # pattern of the temporary files that a killed run leaves


def make_temporary_path(path: Path) -> Path:
    """Return the name of a file's temporary file, which is different for each process."""
    return path.with_name(f'.{path.name}.{os.getpid()}.partial')


@contextmanager
def one_line_write_errors(path: Path, folder: Path) -> Iterator[None]:
    """Convert OSErrors for paths in or above ``folder`` to a one-line InputError that names ``path``."""
    try:
        yield
    except OSError as error:
        names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        if names and not any(name.is_relative_to(folder) or folder.is_relative_to(name) for name in names):
            raise
        raise InputError(
            f'{path}: could not be written ({error.strerror or error}). Existing files are unchanged; free space or '
            'choose another place'
        ) from error


@contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; on an error, remove those that are new and empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # stops at the first that is not empty
            for path in new:
                path.rmdir()
        raise


def replace_file(temporary: Path, path: Path) -> None:
    """Flush a temporary file to disk, and rename it to ``path``, which may exist."""
    with temporary.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # flushes the new name
    finally:
        os.close(folder)


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to ``path`` at the end of the block.

    At any time ``path`` is the old file or the complete new one. Its folder is created.

    Raises:
        InputError: if the file cannot be written, for instance on a full disk; the temporary file is removed.
    """
    path = Path(path)
    temporary = make_temporary_path(path)
    with one_line_write_errors(path, path.parent), create_folder(path.parent):
        try:
            yield temporary
            replace_file(temporary, path)
        finally:
            with suppress(OSError):  # on a read-only disk, where it does not exist
                temporary.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | str) -> None:
    """Write a file atomically; see :func:`write_atomically`."""
    with write_atomically(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_folder_atomically(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, and move its files to ``folder`` at the end of the block.

    Files of the same names are replaced; others stay. The folder is created.

    Raises:
        InputError: if a file cannot be written; the folder is unchanged then.
    """
    folder = Path(folder)
    temporary = folder / PARTIAL
    with one_line_write_errors(folder, folder), create_folder(folder):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        try:
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.rglob('*')):
                place = folder / path.relative_to(temporary)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                elif place.exists():
                    replace_file(path, place)
                else:
                    os.replace(path, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[None]:
    """Move a folder away so that the block can write a new one; on an error, restore the old one."""
    before = folder.with_name(f'.{folder.name}.before')
    with one_line_write_errors(folder, folder.parent):
        if before.exists():  # left by a killed run
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            folder.rename(before)
    try:
        yield
    except BaseException:
        if before.exists():
            shutil.rmtree(folder, ignore_errors=True)
            before.rename(folder)
        raise
    shutil.rmtree(before, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Return whether a folder is empty except for the temporary folder of a killed run."""
    return folder.is_dir() and not any(path.name != PARTIAL for path in folder.iterdir())


def display_path(path: str | Path) -> str:
    """Return a path relative to the working directory if it is inside; otherwise unchanged."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith('..') or '://' in str(path) else relative


def format_csv(rows: Sequence[dict]) -> str:
    """Return rows as CSV, with a column for every key that occurs."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def compute_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open('rb') as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
