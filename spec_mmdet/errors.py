"""The one exception for what a user can put right: the command line tools print it as a single line."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """An input that cannot be used; the message says what is wrong with it and what to do."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin the message of an InputError raised inside with the name of the input."""
    try:
        yield
    except InputError as error:
        raise InputError(f'{name}: {error}') from error
