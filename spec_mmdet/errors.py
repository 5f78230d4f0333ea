"""The one exception for what a user can put right: the command line tools print it as a single line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """An input that cannot be used; the message says in one line what is wrong with it and what to do."""

    def __init__(self, message: str) -> None:
        # What it quotes of a file may hold anything, line breaks included.
        super().__init__(''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message))


@contextmanager
def prefix_errors(name: str) -> Iterator[None]:
    """Begin the message of an InputError raised inside with the name of the input."""
    try:
        yield
    except InputError as error:
        raise InputError(f'{name}: {error}') from error


def list_briefly(names: Sequence[str]) -> str:
    """Names for a message: no more than five of them, and how many they are."""
    return ', '.join(names[:5]) + (f', ... {len(names)} in all' if len(names) > 5 else '')
