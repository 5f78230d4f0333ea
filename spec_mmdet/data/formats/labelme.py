"""Read the JSON files of LabelMe and X-AnyLabeling, one for each image."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from ..splits import Split
from .export import Builder, Export, build_splits, clip, compute_box, group_by_split, outline_ellipse

SHAPES = 'polygon', 'rectangle', 'rotation', 'circle', 'mask'
USED = 'version shapes imagePath imageData imageHeight imageWidth lineColor fillColor'.split()  # noqa: SIM905
USED_OF_SHAPES = 'label points shape_type group_id difficult mask line_color fill_color'.split()  # noqa: SIM905


def read_labelme(export: Export) -> list[Split] | None:
    """Read an export in LabelMe's format; None for other formats.

    Polygons, rectangles, circles and masks are used; other shapes are reported. Shapes with the same group_id and label
    are one object. The image is that of imagePath, or else of the same name as the file, or else imageData.
    """
    files = {}
    for path in export.list_files('.json'):
        try:
            content = load_labelme(path)
        except ValueError as error:
            export.add_error('unreadable JSON files', path, str(error))
            export.used.add(path)
            continue
        if content is not None:
            files[path] = content
    if not files:
        return None
    by_name = {path: image for image, path in export.pair(export.images, list(files), {}).items()}
    images: dict[Path, Path] = {}
    for path, content in files.items():
        stated = str(content.get('imagePath') or '')
        image = export.find_image(stated, path)
        if image is None and path in by_name:
            image = by_name[path]
            export.add_note('label files whose image is found by their own name, not by imagePath', path, stated)
        image = image or extract_image(export, path)
        if image is None:
            export.add_warning('label files without their image, not used', path, stated)
            export.used.add(path)
        else:
            images[path] = image
    splits = group_by_split(export, images)
    builders = [Builder(export, split) for split in splits]
    for builder in builders:
        for path in splits[builder.name]:
            add_labelme(builder, images[path], path, files[path])
    return build_splits(export, 'LabelMe', builders)


def load_labelme(path: Path) -> dict | None:
    """Return a JSON file's content without its image; None if it is not LabelMe's.

    Raises:
        ValueError: if it is corrupt.
    """
    content = path.read_bytes()
    content = json.loads(content) if b'"shapes"' in content else None
    if not isinstance(content, dict) or not isinstance(content.get('shapes'), list):
        return None
    return {key: value for key, value in content.items() if key != 'imageData'}


def extract_image(export: Export, path: Path) -> Path | None:
    """Write the image in a label file to the temporary folder; return None if there is none."""
    try:
        content = base64.b64decode(json.loads(path.read_bytes())['imageData'])
        with Image.open(io.BytesIO(content)) as image:
            suffix = f'.{image.format.lower()}'
    except Exception:  # missing or corrupt
        return None
    target = (export.scratch / 'extracted' / export.format_path(path)).with_suffix(suffix)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return target


def add_labelme(builder: Builder, image: Path, path: Path, content: dict) -> None:
    """Add an image and its objects."""
    try:
        stated = [float(content[key]) for key in ('imageWidth', 'imageHeight')]
    except (KeyError, TypeError, ValueError):
        stated = []
    size = builder.add_image(image, path, stated)
    if size is None:
        return
    builder.export.note_unused('label files', content, USED, path)
    groups: dict[object, list[tuple[str, dict, list[float]]]] = {}
    for number, shape in enumerate(content['shapes'], start=1):
        try:
            name, kind = str(shape['label']).strip(), shape.get('shape_type') or 'polygon'
            if kind not in SHAPES:
                builder.export.add_warning(f'objects of the type {kind}, not used', path, name)
                continue
            points = [float(v) for point in shape['points'] for v in point]
            if not name or len(points) % 2 or not all(map(math.isfinite, points)):
                raise ValueError('missing label, or points are not pairs of numbers')
            if len(points) < (6 if kind in ('polygon', 'rotation') else 4):
                raise ValueError(f'a {kind} of {len(points) // 2} points')
            decode_mask(shape, kind)
            builder.export.note_unused('objects', shape, USED_OF_SHAPES, path, name)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            detail = f'shape {number}: {type(error).__name__}: {error}'
            builder.add_fault('unreadable shapes of LabelMe', path, detail)
            continue
        group = number if shape.get('group_id') is None else (name, str(shape['group_id']))
        groups.setdefault(group, []).append((kind, shape, points))
    for parts in groups.values():
        polygons, masks, everything = [], [], []
        for kind, shape, points in parts:
            if kind == 'circle':
                radius = math.dist(points[:2], points[2:4])
                points = clip(outline_ellipse(*points[:2], radius, radius), *size)
            elif kind == 'rectangle':
                x, y, w, h = compute_box(points)
                points = [x, y, x + w, y, x + w, y + h, x, y + h]
            if kind == 'mask':
                masks.append((round(points[0]), round(points[1]), decode_mask(shape, kind)))
            else:
                polygons.append(points)
            everything += points
        boxes_alone = all(kind == 'rectangle' for kind, *_ in parts)
        crowd = all(bool(shape.get('difficult')) for _, shape, _ in parts)  # a field of X-AnyLabeling, as in Pascal VOC
        name = str(parts[0][1]['label']).strip()
        builder.add_object(name, compute_box(everything), [] if boxes_alone else polygons, crowd, masks)


def decode_mask(shape: dict, kind: str) -> np.ndarray | None:
    """Decode the mask, shape (H, W), of a shape of type 'mask'; None for other types.

    Raises:
        ValueError: if it is missing, empty or not an image.
    """
    if kind != 'mask':
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape['mask']))) as image:
            mask = np.asarray(image.convert('L')) > 0
    except Exception as error:
        raise ValueError('the mask is not a PNG in base64') from error
    if not mask.any():
        raise ValueError('the mask is empty')
    return mask
