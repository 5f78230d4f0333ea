"""Show in a terminal that work is in progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

_shown: list[str] = []  # texts of the current blocks


@contextmanager
def show_status(text: str) -> Iterator[None]:
    """Show a line with the elapsed time on stderr, if that is a terminal, while the block (or function) runs.

    Within another status, nothing is shown.
    """
    silent = sys.stdout is None or not sys.stderr.isatty()  # redirect_stdout(None) is used around pycocotools
    if _shown or silent or os.environ.get('LOCAL_RANK', '0') != '0':
        line = nullcontext()
    else:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        # What the block prints goes to stdout as it is, which may be a file.
        redirect = dict(redirect_stdout=sys.stdout.isatty())
        columns = SpinnerColumn(), TextColumn('{task.description}'), TimeElapsedColumn()
        line = Progress(*columns, console=Console(stderr=True), transient=True, **redirect)
        line.add_task(text, total=None)
    _shown.append(text)
    try:
        with line:
            yield
    finally:
        _shown.pop()
