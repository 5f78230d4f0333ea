"""Writing files so that nothing is lost: aside, flushed to the disk, then renamed."""

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

PARTIAL = '.partial'  # the folder, within the one that is written, for what is not whole yet
LEFTOVERS = '.*.partial'  # what files are called that a run that was killed was writing


def temporary_path(path: Path) -> Path:
    """Where a file is written until it is whole; one place a process, as several may write the same file."""
    return path.with_name(f'.{path.name}.{os.getpid()}.partial')


@contextmanager
def one_line_write_errors(path: Path, folder: Path) -> Iterator[None]:
    """Have an OSError within a folder, or of one above it, be the one line that says what could not be written.

    Raises:
        InputError: where there was one.
    """
    try:
        yield
    except OSError as error:
        names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
        if names and not any(name.is_relative_to(folder) or folder.is_relative_to(name) for name in names):
            raise  # something else, that could not be read
        raise InputError(
            f'{path}: could not be written ({error.strerror or error}); what was there is untouched'
        ) from error


@contextmanager
def create_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it; where things fail, remove the ones that are empty again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty
            for path in new:
                path.rmdir()
        raise


def replace_file(aside: Path, path: Path) -> None:
    """Flush a file to the disk, and give it the name of another, which may be there."""
    with aside.open('rb') as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which takes the name of the file once it is whole and on the disk.

    Whatever happens, a file of that name is whole: the one that was there before, or the new one. Its folder is made.

    Raises:
        InputError: where it cannot be written, as on a disk that is full; nothing half-written is left then.
    """
    path = Path(path)
    aside = temporary_path(path)
    with one_line_write_errors(path, path.parent), create_folder(path.parent):
        try:
            yield aside
            replace_file(aside, path)
        finally:
            with suppress(OSError):  # read-only, so that there is none
                aside.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | str) -> None:
    """Write a whole file; see :func:`write_atomically`."""
    with write_atomically(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def write_folder_atomically(folder: str | Path) -> Iterator[Path]:
    """Give a folder to write to, whose files go to another one together, once all of them are whole.

    They take the places of those that have their names; others stay. The folder is made.

    Raises:
        InputError: where one cannot be written; the folder is as it was then.
    """
    folder = Path(folder)
    aside = folder / PARTIAL
    with one_line_write_errors(folder, folder), create_folder(folder):
        shutil.rmtree(aside, ignore_errors=True)  # what a run that was killed left
        try:
            aside.mkdir()
            yield aside
            for path in sorted(aside.rglob('*')):
                place = folder / path.relative_to(aside)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                elif place.exists():
                    replace_file(path, place)
                else:
                    os.replace(path, place)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[None]:
    """Make way for a new folder of that name. Where things fail, the one that was there comes back."""
    before = folder.with_name(f'.{folder.name}.before')
    with one_line_write_errors(folder, folder.parent):
        if before.exists():  # a run was killed
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
    """Whether a folder holds nothing but what a run that was killed left."""
    return folder.is_dir() and not any(path.name != PARTIAL for path in folder.iterdir())


def display_path(path: str | Path) -> str:
    """A path from where the command was started, where it lies below that; else as it is."""
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
