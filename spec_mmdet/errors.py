"""The exception for errors that a user can fix: the commands print it as one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class InputError(ValueError):
    """Error in a user's input; its one-line message describes the fault and the remedy."""

    def __init__(self, message: str) -> None:
        # Text quoted from a file may contain line breaks and control characters.
        super().__init__(''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message))


@contextmanager
def prefix_errors(name: str, advice: str = '') -> Iterator[None]:
    """Prefix the message of an InputError raised in the block with the name of the input; add advice if it has none."""
    try:
        yield
    except InputError as error:
        raise InputError(f'{name}: {error}{f". {advice}" if advice and ". " not in str(error) else ""}') from error


def list_briefly(names: Sequence[str]) -> str:
    """Join up to five names for a message, followed by the total number if there are more."""
    return ', '.join(names[:5]) + (f', ... {len(names)} in all' if len(names) > 5 else '')
