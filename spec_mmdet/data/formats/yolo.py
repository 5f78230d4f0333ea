"""Read YOLO's text files from Ultralytics, Darknet (CVAT's YOLO 1.1), labelImg, Label Studio and Roboflow.

A line is a box (class, centre, width, height), a polygon (class, points) or, with ``kpt_shape``, a box and keypoints.
Coordinates are fractions of the image. Source: https://docs.ultralytics.com/datasets/detect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from urllib.parse import unquote

import yaml

from ...errors import InputError
from ..splits import Split
from .export import (
    SPLITS,
    Builder,
    Export,
    build_splits,
    compute_box,
    group_by_split,
    parse_split,
    read_lines,
    read_text,
    require_unique,
    split_path,
)

CLASS_FILES = ('classes.txt', 'labels.txt', '_darknet.labels')  # and files with the suffix .names
NOTHING = ('', 'null', '~', [])  # YAML's empty values, read as text


class UniqueLoader(yaml.BaseLoader):
    """YAML loader that reads scalars as text, so that ``no`` can be a class name, and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            raise yaml.YAMLError(f'line {node.start_mark.line + 1}: a key occurs twice in one mapping')
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """Read a YAML file with all scalars as text; {} if it is not a mapping.

    Raises:
        InputError: if it is not YAML.
    """
    try:
        content = yaml.load(read_text(path), Loader=UniqueLoader)  # noqa: S506, it builds only text, lists and dicts
    except yaml.YAMLError as error:
        raise InputError(f'{path}: not YAML ({" ".join(str(error).split())}). Correct it') from error
    return content if isinstance(content, dict) else {}


def read_yolo(export: Export) -> list[Split] | None:
    """Read an export in YOLO's format; None for other formats.

    The classes are in data.yaml, a .names file, classes.txt or labels.txt. data.yaml, obj.data, train.txt or the names
    of folders define the splits. A label file has its image's name; it is in labels/, next to the image, or anywhere if
    its name is unique.

    Raises:
        InputError: if the classes or the splits are ambiguous.
    """
    configs = [path for path in export.list_files('.yaml', '.yml') if b'names' in path.read_bytes()]
    configs = [(path, read_yaml(path)) for path in configs]
    configs = [(path, config) for path, config in configs if 'names' in config]
    files = [path for path in export.files if path.name.lower() in CLASS_FILES or path.suffix.lower() == '.names']
    stems = {unquote(image.stem) for image in export.images}
    if not configs and not (files and any(unquote(path.stem) in stems for path in export.list_files('.txt'))):
        return None
    path, config = configs[0] if configs else (files[0], {})
    classes = read_classes(export, configs, files)
    lists = find_lists(export, path.parent, config)
    labels = [path for path in export.list_files('.txt') if path not in export.used]
    splits = lists or group_by_split(export, export.images)
    outside = [image for image in chain(*splits.values()) if not image.is_relative_to(export.folder)]
    labels += filter(Path.is_file, dict.fromkeys(chain(*map(list_usual_labels, outside))))
    pairs = export.pair(list(dict.fromkeys([*export.images, *outside])), labels, {})
    keypoints = read_keypoints(config, path)
    builders = [Builder(export, split) for split in splits]
    for builder in builders:
        for image in splits[builder.name]:
            if image not in export.unclear:
                add_yolo(builder, image, pairs.get(image), classes, keypoints)
    return build_splits(export, 'YOLO', builders, list(classes.values()))


def read_classes(export: Export, configs: Sequence[tuple[Path, dict]], files: Sequence[Path]) -> dict[int, str]:
    """Read the class name of each number in the labels, from data.yaml or else from files of class names.

    Raises:
        InputError: if these are invalid, or contradict each other.
    """
    contents = [config for _, config in configs] or [require_unique(read_lines(path), path) for path in files]
    if any(content != contents[0] for content in contents):
        names = ', '.join(export.format_path(path) for path in ([path for path, _ in configs] or files))
        raise InputError(f'{export.folder}: {names} differ. Keep only the one that belongs to the labels')
    export.used.update(files, (path for path, _ in configs))
    if not configs:
        return dict(enumerate(contents[0]))
    path, config = configs[0]
    classes = number_classes(config['names'], path)
    check_count(config, classes, path)
    for other in files:
        if read_lines(other) != list(classes.values()):
            export.add_warning(f'class files that differ from {export.format_path(path)}, not used', other)
    return classes


def number_classes(names: object, path: Path) -> dict[int, str]:
    """Map the numbers in the labels to class names, sorted by number.

    Raises:
        InputError: if the "names" of data.yaml are not a one-to-one mapping.
    """
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    if not isinstance(names, dict) or not all(isinstance(name, str) and key.isdecimal() for key, name in names.items()):
        raise InputError(f'{path}: "names" is {names!r:.60}. Write a list of names, or a line "NUMBER: NAME" for each')
    classes = {int(key): name.strip() for key, name in sorted(names.items(), key=lambda item: int(item[0]))}
    if len(classes) < len(names):
        raise InputError(f'{path}: "names" contains a number twice. Remove one of the two lines')
    require_unique(list(classes.values()), path)
    return classes


def check_count(config: dict, classes: dict[int, str], path: Path) -> None:
    """Check that ``nc`` is the number of names, or the largest number plus 1.

    Raises:
        InputError: if not.
    """
    count = config.get('nc')
    if count is not None and count not in (str(len(classes)), str(max(classes) + 1)):
        raise InputError(f'{path}: nc is {count!r:.20}, but names has {len(classes)} entries. Correct one of them')


def read_keypoints(config: dict, path: Path) -> int:
    """Return the number of values of keypoints after a box, from ``kpt_shape``: [points, 2 or 3].

    Raises:
        InputError: if ``kpt_shape`` is invalid.
    """
    shape = config.get('kpt_shape')
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(str(v).isdecimal() for v in shape):
        raise InputError(f'{path}: kpt_shape is {shape!r:.40}. Write [number of points, 2 or 3]')
    return int(shape[0]) * int(shape[1])


def find_lists(export: Export, base: Path, config: dict) -> dict[str, list[Path]]:
    """Return the images of each split from data.yaml, obj.data or lists next to the classes; {} without these."""
    config = {key: value for key, value in config.items() if value not in NOTHING}
    stated = {split: [config[word] for word in words if word in config] for split, words in SPLITS.items()}
    root = base / str(config.get('path') or '')
    for path in export.list_files('.data') if not config else ():
        export.used.add(path)
        pairs = [line.partition('=') for line in read_lines(path)]
        for split, words in SPLITS.items():
            stated[split] += [value.strip() for key, _, value in pairs if key.strip().lower() in words]
    if not config and not any(stated.values()):
        for path in export.list_files('.txt'):
            if path.parent in (base, export.folder) and (split := parse_split(path.stem)):
                stated[split].append(str(path))
    images = {}
    for split, values in stated.items():
        entries = [entry for value in values for entry in (value if isinstance(value, list) else [value])]
        if entries and (found := list(chain(*(find_entry(export, root, base, split, e) for e in entries)))):
            images[split] = list(dict.fromkeys(found))
            if len(images[split]) < len(found):
                kind = f'images that the lists of {split} contain more than once, used once'
                export.add_warning(kind, base, f'{len(found) - len(images[split])} of them')
    return images


def find_entry(export: Export, root: Path, base: Path, split: str, entry: object) -> list[Path]:
    """Return the images of a folder or list in data.yaml or obj.data.

    For a path from a different machine, the longest end of it that exists in the export is used.

    Raises:
        InputError: if it does not exist, except for a test split.
    """
    if not isinstance(entry, str):
        raise InputError(f'{base}: contains {entry!r:.60} for {split}. Write a folder or a .txt list of images')
    parts = split_path(entry.replace('\\', '/'))
    stated = [root / entry, base / entry, export.folder / entry]
    ends = [folder.joinpath(*parts[i:]) for i in range(len(parts)) for folder in (base, export.folder)]
    place = next((Path(os.path.abspath(place)) for place in (*stated, *ends) if place.exists()), None)
    if place is None:
        if split != 'test':  # Roboflow always lists a test split, even if it exports none
            raise InputError(
                f'{export.folder}: lacks {entry} of the split {split}. Copy it there, or delete this entry'
            )
        export.add_warning('missing test splits', base, entry)
        return []
    if not any(path.exists() for path in stated):
        export.add_note('folders or lists found by the end of their path', place, entry)
    if place.is_dir():
        if place.is_relative_to(export.folder):
            return [image for image in export.images if image.is_relative_to(place)]
        return Export(place, export.found, export.scratch).images
    export.used.add(place)
    images = []
    for line in read_lines(place):
        if image := export.find_image(line, place) or export.find_image(line, root / 'data.yaml'):
            images.append(image)
        else:
            export.add_error('entries of lists without an image', place, line)
    return images


def list_usual_labels(image: Path) -> Iterator[Path]:
    """Yield the usual paths of an image's label file: Ultralytics' folder labels/, and next to the image."""
    parts = list(image.parts)
    if 'images' in parts:
        parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
        yield Path(*parts).with_suffix('.txt')
    yield image.with_suffix('.txt')


def add_yolo(builder: Builder, image: Path, labels: Path | None, classes: dict[int, str], keypoints: int) -> None:
    """Add an image and the objects of its label file."""
    export = builder.export
    size = builder.add_image(image, labels)
    if labels is None:
        export.add_warning('images without a label file, used as images without objects', image)
    if size is None or labels is None:
        return
    try:
        lines = read_text(labels).splitlines()
    except InputError:
        builder.add_fault('label files that are not UTF-8 text', labels)
        return
    seen = set()
    for number, line in enumerate(lines, start=1):
        if line.strip() and line in seen:
            export.add_warning('duplicate lines of label files, used once', labels, f'line {number}')
        if not line.strip() or line in seen:
            continue
        seen.add(line)
        try:
            add_line(builder, line.split(), size, classes, keypoints)
        except ValueError as error:
            builder.add_fault('unreadable lines of label files', labels, f'line {number}: {error}')
    if keypoints and lines:
        export.add_warning('label files with keypoints, only the boxes are used', labels)


def add_line(builder: Builder, fields: Sequence[str], size: tuple[int, int], classes: dict[int, str], keypoints: int):
    """Add the object of a line.

    Raises:
        ValueError: if the line is invalid.
    """
    width, height = size
    try:
        index, *values = map(float, fields)
    except ValueError:
        raise ValueError(f'{" ".join(fields)!r:.60} are not all numbers') from None
    if index not in classes:
        raise ValueError(f'class {fields[0]:.20} has no name among {len(classes)} classes')
    name = classes[int(index)]
    if len(values) == 4 or keypoints and len(values) == 4 + keypoints:
        x, y, w, h = values[:4]
        builder.add_object(name, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height])
    elif not keypoints and len(values) >= 6 and len(values) % 2 == 0:
        polygon = [value * (height if k % 2 else width) for k, value in enumerate(values)]
        builder.add_object(name, compute_box(polygon), [polygon])
    else:
        wanted = f'{4 + keypoints} for a box with keypoints' if keypoints else 'an even number from 6 for a polygon'
        raise ValueError(f'{len(values)} numbers after the class instead of 4 for a box or {wanted}')
