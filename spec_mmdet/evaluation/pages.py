"""What the pages of results share: their frame, and the folders that they may be written to."""

from __future__ import annotations

from pathlib import Path

import jinja2

from ..errors import InputError
from ..files import is_empty

PAGE = 'index.html'


def mark_of(kind: str) -> str:
    """The line by which a page of a kind is known for one."""
    return f'<meta name="generator" content="spec_mmdet {kind}">'


def page_of(kind: str, **values: object) -> str:
    """A page, 'report' or 'comparison', filled in."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent, 'utf-8')
    template = jinja2.Environment(loader=loader, autoescape=True).get_template(f'{kind}.html')
    return template.render(values, mark=mark_of(kind))


def require_free(option: str, folder: Path, kind: str) -> None:
    """Refuse a folder for a page that is neither new nor empty nor an earlier page's of the same kind.

    Raises:
        InputError: naming the option that it was given by.
    """
    page = folder / PAGE
    earlier = page.is_file() and mark_of(kind).encode() in page.read_bytes()
    if folder.exists() and not is_empty(folder) and not earlier:
        raise InputError(f'{option} {folder}: holds something other than a {kind}; name a new folder')
