"""Tables in Markdown, for the reports of the experiments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def format_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format a table as lines of Markdown."""
    return ['| ' + ' | '.join(map(str, row)) + ' |' for row in (columns, ['---'] * len(columns), *rows)]
