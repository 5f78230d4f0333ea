"""Read Label Studio's JSON and JSON-MIN: a file with a list of tasks, whose coordinates are percentages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..splits import WHOLE, Split
from .export import MISSING, Builder, Export, build_splits, clip, compute_box, outline_ellipse

# The shapes, each with a field that only its values have.
SHAPES = dict(points='polygon', radiusX='ellipse', rle='brush', width='rectangle')
LABELS = {'labels', 'rectanglelabels', 'polygonlabels', 'ellipselabels', 'brushlabels'}
USED = LABELS | {*SHAPES, 'original_width', 'original_height', 'origin', 'from_name', 'to_name', 'format', 'closed'}
USED |= {'id', 'type', 'value', 'x', 'y', 'height', 'radiusY', 'rotation'}


def read_label_studio(export: Export) -> list[Split] | None:
    """Read Label Studio's JSON or JSON-MIN; None for other formats.

    Rectangles, polygons, ellipses and brushes are used; other results are reported. Only the first of several
    annotations of a task is used.
    """
    builder, seen = Builder(export, WHOLE), False
    for path in export.list_files('.json'):
        for task in load_tasks(path):
            seen = True
            export.used.add(path)
            try:
                add_task(builder, path, task)
            except (AttributeError, TypeError) as error:
                export.add_error('unreadable tasks', path, f'task {task.get("id")}: {error}')
    return build_splits(export, 'Label Studio', [builder]) if seen else None


def load_tasks(path: Path) -> list[dict]:
    """Return the tasks of a JSON file; [] if it is not Label Studio's."""
    try:
        content = path.read_bytes()
        content = json.loads(content) if content.lstrip()[:1] == b'[' else None
    except ValueError:
        return []
    tasks = content if isinstance(content, list) and all(isinstance(task, dict) for task in content) else []
    known = any('annotation_id' in task or 'lead_time' in task or isinstance(task.get('data'), dict) for task in tasks)
    return tasks if known else []


def list_results(task: dict, annotations: list[dict]) -> Iterator[dict]:
    """Yield the results of a task's first annotation, merged with the fields of their values."""
    for result in annotations[0].get('result', ()) if annotations else ():
        yield {**result, **result.get('value', {})}
    for value in task.values() if not isinstance(task.get('data'), dict) else ():  # JSON-MIN: a list for each control
        if isinstance(value, list):
            yield from (result for result in value if isinstance(result, dict))


def add_task(builder: Builder, path: Path, task: dict) -> None:
    """Add a task's image and objects."""
    export = builder.export
    names = [value for value in {**task, **(task.get('data') or {})}.values() if isinstance(value, str)]
    named = [image for name in names if (image := export.find_image(name, path, loosely=True))]
    if len(set(named)) != 1:
        detail = f'task {task.get("id")}: {next((name for name in names if "/" in name), "")}'
        export.add_error('tasks with several images: export one task per image' if named else MISSING, path, detail)
        export.used.update(named)
        return
    (image,) = set(named)
    stated = task.get('annotations', task.get('completions'))  # the name before version 1.0
    annotations = [entry for entry in stated or () if not entry.get('was_cancelled')]
    if not annotations and (stated is not None or isinstance(task.get('data'), dict)):
        export.add_warning('tasks without an annotation, not used', path, export.format_path(image))
        export.used.add(image)
        return
    if image in builder.paths or len(annotations) > 1:
        kind = 'tasks with several annotations, only the first is used'
        export.add_warning(kind, path, export.format_path(image))
        if image in builder.paths:
            return
    export.note_unused('tasks', dict(predictions=task.get('predictions')), (), path, export.format_path(image))
    results = list(list_results(task, annotations))
    labelled = {result.get('id') for result in results if not LABELS.isdisjoint(result)}
    stated = next(([r['original_width'], r['original_height']] for r in results if r.get('original_height')), [])
    size = builder.add_image(image, path, stated)
    for result in results if size else ():
        label, shape = (next((key for key in keys if key in result), None) for keys in (LABELS, SHAPES))
        where = f'task {task.get("id")}, {result.get("type") or result.get("id") or ""}'.strip(' ,')
        if label is None and result.get('type') in SHAPES.values() and result['id'] in labelled:
            continue  # the shape of a result of the type labels
        if label is None or shape is None:
            kind = 'results other than rectangles, polygons, ellipses and brushes with a label, not used'
            export.add_warning(kind, path, where)
            continue
        export.note_unused('results', result, USED, path, where)
        try:
            if len(result[label]) != 1:
                raise ValueError(f'{len(result[label])} labels instead of one')
            add_result(builder, *result[label], SHAPES[shape], result, size)
        except (KeyError, TypeError, ValueError) as error:
            detail = f'{where}: {type(error).__name__}: {error}'
            builder.add_fault('unreadable results of Label Studio', path, detail)


def add_result(builder: Builder, name: str, shape: str, result: dict, size: tuple[int, int]) -> None:
    """Add an object given in percent, rotated about a corner (rectangle) or its centre (ellipse)."""
    width, height = size
    if shape == 'brush':
        builder.add_object(name, [], masks=[(0, 0, decode_brush(result['rle'], width, height))])
        return
    if shape == 'polygon':
        points = [float(v) * size[i] / 100 for point in result['points'] for i, v in enumerate(point)]
        if len(points) < 6:
            raise ValueError(f'a polygon of {len(points) // 2} points')
        builder.add_object(name, compute_box(points), [points])
        return
    x, y = float(result['x']) * width / 100, float(result['y']) * height / 100
    angle = math.radians(float(result.get('rotation') or 0))
    cos, sin = math.cos(angle), math.sin(angle)
    if shape == 'rectangle':
        w, h = float(result['width']) * width / 100, float(result['height']) * height / 100
        offsets = [0, 0, w, 0, w, h, 0, h]
    else:
        rx, ry = float(result['radiusX']) * width / 100, float(result['radiusY']) * height / 100
        offsets = outline_ellipse(0, 0, rx, ry)
    points = []
    for dx, dy in zip(offsets[::2], offsets[1::2]):
        points += [x + dx * cos - dy * sin, y + dx * sin + dy * cos]
    polygon = clip(points, *size)
    builder.add_object(name, compute_box(points if shape == 'rectangle' else polygon), [polygon] * (shape == 'ellipse'))


def decode_brush(rle: list[int], width: int, height: int) -> np.ndarray:
    """Decode a brush's run-length code to a mask, shape (H, W).

    A stream of bits: the number of values (32 bits), the bits of a value less 1 (5), four lengths less 1 (4 each), then
    runs. A run has a bit that marks equal values, two bits that choose a length, the run's number of values less 1 in
    as many bits, and its value, or all values. The values are the image's RGBA channels.
    Source: https://github.com/thi-ng/umbrella/tree/develop/packages/rle-pack.

    Raises:
        ValueError: if it is truncated, empty, or of another size.
    """
    bits, place = ''.join(f'{byte:08b}' for byte in rle), 0

    def read(count: int) -> int:
        nonlocal place
        place += count
        return int(bits[place - count : place] if place <= len(bits) else '', 2)

    total, width_of_value, lengths = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    if total != 4 * width * height:
        raise ValueError(f'a brush of {total} values instead of 4 x {width} x {height}')
    values: list[int] = []
    while len(values) < total:
        is_equal, count = read(1), 0
        count = read(lengths[read(2)]) + 1
        values += [read(width_of_value)] * count if is_equal else [read(width_of_value) for _ in range(count)]
    mask = np.reshape(values[:total], (height, width, 4))[..., 3] > 0
    if not mask.any():
        raise ValueError('the brush is empty')
    return mask
