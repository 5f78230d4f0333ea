"""Common parts of the HTML pages of results: templates, folders, and the record of their data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from ..errors import InputError
from ..files import compute_digest, is_empty

PAGE = 'index.html'
DATA = 'data.json'  # record next to a report's detections: annotation file, its digest, classes, weights


def make_mark(kind: str) -> str:
    """Return the line that marks a page as one of a kind."""
    return f'<meta name="generator" content="spec_mmdet {kind}">'


def render_page(kind: str, name: str, **values: object) -> str:
    """Render the template NAME.html of a page of a kind, 'report' or 'comparison'."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent, 'utf-8')
    template = jinja2.Environment(loader=loader, autoescape=True).get_template(f'{name}.html')
    return template.render(values, mark=make_mark(kind))


def require_free(option: str, folder: Path, kind: str) -> None:
    """Require that a page's folder is new, empty, or contains an earlier page of the same kind.

    Raises:
        InputError: naming the option.
    """
    page = folder / PAGE
    earlier = page.is_file() and make_mark(kind).encode() in page.read_bytes()
    if folder.exists() and not is_empty(folder) and not earlier:
        raise InputError(f'{option} {folder}: contains files other than a {kind}. Pass a new folder')


def record_data(folder: Path, ann_file: Path, classes: Sequence[str], weights: dict[str, object]) -> None:
    """Record the annotation file, classes and weights of a report's detections, for later commands.

    Args:
        folder: the report's folder.
        ann_file: the annotation file.
        classes: names of the evaluated classes.
        weights: the state of the weights (``describe_state``).
    """
    data = dict(annotations=str(ann_file.resolve()), sha256=compute_digest(ann_file), classes=list(classes))
    record = dict(data, weights=weights)
    (folder / DATA).write_text(json.dumps(record, indent=1), 'utf-8')
