"""Collect the findings of data checks by kind, with their places; print them and write them to a file."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..files import write_atomically


@dataclass(frozen=True)
class Place:
    """The place of a finding.

    Attributes:
        file: the annotation file, or the folder of its images.
        image: name of the image, if any.
        annotation: id of the annotation, if any.
        detail: further text.
    """

    file: str
    image: str = ''
    annotation: int | str = ''
    detail: str = ''

    def __str__(self) -> str:
        thing = f'annotation {self.annotation}' * (self.annotation != '')
        thing += ' of ' * bool(thing and self.image) + f'{self.image:.120}'
        if not thing:
            return f'{self.detail} in {self.file}' if self.detail else self.file
        return f'{thing} in {self.file}' + f' ({self.detail})' * bool(self.detail)


@dataclass
class Findings:
    """Findings by kind.

    Errors would stop or spoil training. Dropped items are left out because of an error. Warnings may be intended. Notes
    are for information.

    Attributes:
        faulty_images: positions of faulty images in the list of images, by annotation file.
        faulty_annotations: the same for annotations.
    """

    errors: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    dropped: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[Place]] = field(default_factory=lambda: defaultdict(list))
    faulty_images: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    faulty_annotations: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def list_levels(self) -> dict[str, dict[str, list[Place]]]:
        """Return the findings of each level by its title."""
        levels = {'errors, which you must fix': self.errors, 'left out, because of errors': self.dropped}
        return levels | {'warnings': self.warnings, 'notes': self.notes}

    def update(self, other: Findings) -> None:
        """Add the findings of another object."""
        for mine, theirs in ((self.errors, other.errors), (self.warnings, other.warnings), (self.notes, other.notes)):
            for kind, places in theirs.items():
                mine[kind] += places

    def drop_errors(self) -> None:
        """Turn all errors so far into dropped items."""
        self.dropped, self.errors = self.errors, defaultdict(list)

    def print(self) -> None:
        """Print a line for each kind: the number of cases and the first place."""
        for title, kinds in self.list_levels().items():
            if kinds:
                print(f'\n{title}:')
            for kind, places in kinds.items():
                print(f'{len(places):>8}  {kind}; first: {places[0]}')

    def list_rows(self) -> Iterator[tuple]:
        """Yield each case: level, kind, and the fields of its place."""
        for title, kinds in self.list_levels().items():
            for kind, places in kinds.items():
                for place in places:
                    yield title.partition(',')[0], kind, place.file, place.image, place.annotation, place.detail

    def write(self, path: Path) -> None:
        """Write all cases as CSV."""
        with write_atomically(path) as temporary, temporary.open('w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(('level', 'kind', 'file', 'image', 'annotation', 'detail'))
            writer.writerows(self.list_rows())

    def describe_first_error(self) -> str:
        """Return the first error and the number of errors as one line; '' without errors."""
        if not self.errors:
            return ''
        kind, places = next(iter(self.errors.items()))
        count = sum(map(len, self.errors.values()))
        return f'{places[0]}: {kind}' + f'; {count} errors in all' * (count > 1)

    def require_none(self, advice: str) -> None:
        """Require that there are no errors.

        Raises:
            InputError: one line with the first of them and the advice.
        """
        if self.errors:
            raise InputError(f'{self.describe_first_error()}. {advice}')
