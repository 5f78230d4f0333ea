"""Read Pascal VOC's XML, one file for each image, and "CVAT for images 1.1", one XML file for all images."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ...errors import InputError
from ..splits import WHOLE, Split
from .export import (
    MISSING,
    Builder,
    Export,
    build_splits,
    clip,
    compute_box,
    group_by_split,
    outline_ellipse,
    parse_split,
    read_lines,
)

# Of CVAT.
SHAPES = 'box', 'polygon', 'ellipse', 'mask'
USED = 'label source z_order points rle left top width height xtl ytl xbr ybr cx cy rx ry rotation'.split()  # noqa: SIM905


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file in its declared encoding, else in UTF-8, else in Windows-1252, as labelImg writes on Windows.

    Raises:
        InputError: if it is not XML.
    """
    content = path.read_bytes()
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        try:
            content.decode()
        except UnicodeDecodeError:
            try:
                text = re.sub(r'^\s*<\?xml[^>]*\?>', '', content.decode('cp1252', 'replace'))
                return ElementTree.fromstring(text)
            except ElementTree.ParseError:
                pass
        raise InputError(f'{path}: not XML ({error})') from error
    except (LookupError, ValueError) as error:  # an unknown encoding
        raise InputError(f'{path}: not XML ({error})') from error


def read_numbers(element: ElementTree.Element, names: Sequence[str]) -> list[float]:
    """Read numbers from an element's attributes or children.

    Raises:
        ValueError: if one is missing or not finite.
    """
    values = []
    for name in names:
        text = element.get(name) or element.findtext(name) or ''
        try:
            values.append(float(text))
        except ValueError:
            values.append(math.nan)
        if not math.isfinite(values[-1]):
            raise ValueError(f'{name} is {text!r:.40}, not a number')
    return values


# Pascal VOC


@dataclass
class VocFile:
    """A label file of Pascal VOC."""

    path: Path
    root: ElementTree.Element

    @property
    def size(self) -> list[float]:
        """The stated width and height of the image; [] if they are missing."""
        try:
            return read_numbers(self.root.find('size'), ('width', 'height'))
        except (ValueError, AttributeError):
            return []


def read_voc(export: Export) -> list[Split] | None:
    """Read an export in Pascal VOC's format; None for other formats.

    Only boxes are used. Objects marked difficult become crowds, which training and evaluation ignore. As in
    MMDetection, coordinates start at 1, and 1 is subtracted, unless ``export.zero_based``. Label files and images have
    the same name, in Annotations/ and JPEGImages/ or in one folder. ImageSets/Main or the names of folders define the
    splits.
    """
    files = {}
    for path in export.list_files('.xml'):
        try:
            root = parse_xml(path)
        except InputError as error:
            export.used.add(path)
            export.add_error('unreadable XML files', path, str(error).partition(': ')[2])
            continue
        if root.tag == 'annotation':
            files[path] = VocFile(path, root)
    if not files:
        return None
    stated = {path: (file.root.findtext('filename') or '').strip() for path, file in files.items()}
    pairs = export.pair(export.images, list(files), stated)
    for path in files.keys() - set(pairs.values()) - export.used:  # its name differs from the image's
        if (image := export.find_image(stated[path], path)) and image not in pairs:
            pairs[image] = path
    for path in export.images:
        if path.parent.name in ('SegmentationClass', 'SegmentationObject'):
            export.add_note('segmentation masks of Pascal VOC, not used: only boxes are', path)
            export.used.add(path)
    for image, path in list(pairs.items()):
        other = export.find_image(stated[path], path) if stated[path] != image.name else None
        if other is None and stated[path] != image.name:
            export.add_note('XML files whose image is found by their own name, not by <filename>', path, stated[path])
        if other is not None and other != image:
            detail = f'<filename> is {stated[path]}, but the image of the same name is {image.name}'
            export.add_error('XML files whose <filename> is a different image', path, detail)
            export.used.update((path, image))
            del pairs[image]
    for path in pairs.values() if not export.zero_based else ():
        export.add_note('XML files with 1 subtracted from the coordinates (--zero-based turns it off)', path)
    splits = read_image_sets(export, pairs) or group_by_split(export, pairs)
    builders = [Builder(export, split) for split in splits]
    for builder in builders:
        for image in splits[builder.name]:
            add_voc(builder, image, files[pairs[image]])
    return build_splits(export, 'Pascal VOC', builders)


def add_voc(builder: Builder, image: Path, file: VocFile) -> None:
    """Add an image and the objects of its XML file."""
    export = builder.export
    if builder.add_image(image, file.path, file.size) is None:
        return
    first = 0 if export.zero_based else 1
    known = 'folder', 'filename', 'path', 'source', 'owner', 'size', 'object'
    export.note_unused('XML files', {child.tag: [*child] or child.text for child in file.root}, known, file.path)
    for thing in file.root.findall('object'):
        name, boxes = (thing.findtext('name') or '').strip(), thing.findall('bndbox')
        try:
            if not name or len(boxes) != 1:
                raise ValueError(f'{len(boxes)} <bndbox> instead of one' if name else '<name> is missing')
            x0, y0, x1, y1 = read_numbers(boxes[0], ('xmin', 'ymin', 'xmax', 'ymax'))
        except ValueError as error:
            builder.add_fault('unreadable objects of XML files', file.path, str(error))
            continue
        if first and min(x0, y0) < 1:
            kind = 'boxes with coordinates below 1, although they start at 1: pass --zero-based if they start at 0'
            export.add_warning(kind, file.path, f'xmin {x0:g}, ymin {y0:g}')
        extras = {child.tag: [*child] or child.text for child in thing}
        export.note_unused('objects', extras, ('name', 'bndbox', 'difficult'), file.path, name)
        crowd = (thing.findtext('difficult') or '').strip() == '1'
        builder.add_object(name, [x0 - first, y0 - first, x1 - x0, y1 - y0], crowd=crowd)


def read_image_sets(export: Export, pairs: dict[Path, Path]) -> dict[str, list[Path]]:
    """Return the images of each split in the lists of ImageSets/Main, or in others of these names; {} without any.

    trainval.txt and lists of other names form the data without split. Next to train.txt and val.txt they are redundant.
    """
    lists: dict[str, list[Path]] = {}
    files = export.list_files('.txt')
    stated = [path for path in files if path.parent.name.lower() == 'main']
    for path in stated or [path for path in files if path.stem == 'trainval' or parse_split(path.stem)]:
        if path in stated and re.search(r'_(train|val|trainval|test)$', path.stem):
            continue  # a list of one class
        lists.setdefault(parse_split(path.stem) or WHOLE, []).append(path)
    if 'train' in lists and 'val' in lists:
        export.used.update(lists.pop(WHOLE, ()))
    elif WHOLE in lists:  # trainval.txt, which contains train.txt or val.txt
        for split in ('train', 'val'):
            for path in lists.pop(split, ()):
                export.add_warning('lists of a part of another list, not used', path)
                export.used.add(path)
    by_name: dict[str, list[Path]] = {}
    for image, path in pairs.items():
        *folders, stem = path.relative_to(export.folder).with_suffix('').parts
        below = next((i + 1 for i, name in enumerate(folders) if name.lower() == 'annotations'), len(folders))
        for name in {stem, '/'.join([*folders[below:], stem])}:
            by_name.setdefault(name, []).append(image)
    splits = {}
    for split, paths in lists.items():
        images: dict[Path, None] = {}
        for path, line in chain(*(((path, line) for line in read_lines(path)) for path in paths)):
            export.used.add(path)
            first = re.sub(r'^.*JPEGImages/', '', re.split(r'\s+\S*Annotations/', line)[0])  # PaddleDetection's lists
            names = [line, re.sub(r'\s+-?\d+$', '', line), re.sub(r'\.\w{3,4}$', '', first)]
            found = next((by_name[name] for name in names if name in by_name), [])
            found = [image for image in found if image.is_relative_to(path.parents[2])] or found  # VOC2007 or VOC2012
            if len(found) == 1:
                images[found[0]] = None
            else:
                export.add_error('entries of lists without a unique image and XML file', path, line)
        splits[split] = list(images)
    return splits


# CVAT for images 1.1


def read_cvat(export: Export) -> list[Split] | None:
    """Read an export in "CVAT for images 1.1"; None for other formats.

    Boxes, polygons, ellipses and masks are used; other shapes are reported. The task defines the order of the classes,
    and the names of subsets define the splits.
    """
    roots = [(path, root) for path in export.list_files('.xml') if (root := parse_cvat(path)) is not None]
    if not roots:
        return None
    classes: dict[str, None] = {}
    builders: dict[str, Builder] = {}
    subsets = {parse_split(image.get('subset') or '') for _, root in roots for image in root.iter('image')}
    for path, root in roots:
        export.used.add(path)
        if root.find('track') is not None:
            raise InputError(
                f'{path}: unsupported format "CVAT for video". Export it as "CVAT for images 1.1" or "COCO 1.0"'
            )
        classes |= {label.findtext('name', '').strip(): None for label in root.findall('./meta//labels/label')}
        for entry in root.findall('image'):
            name, subset = entry.get('name', ''), entry.get('subset') or ''
            image = export.find_image(name, path.parent / 'images' / path.name, subset)
            split = parse_split(subset) or WHOLE
            if image is None:
                export.add_error(MISSING, path, name)
            elif split == WHOLE and subsets != {None}:
                export.add_warning('images of subsets other than train, val and test, not used', image, subset)
                export.used.add(image)
            else:
                add_cvat(builders.setdefault(split, Builder(export, split)), image, path, entry)
    for builder in builders.values():
        classes |= {annotation['category_id']: None for annotation in builder.annotations}
    return build_splits(export, 'CVAT for images', builders.values(), list(classes))


def parse_cvat(path: Path) -> ElementTree.Element | None:
    if b'<annotations' not in path.read_bytes()[:1000]:
        return None
    root = parse_xml(path)
    return root if root.tag == 'annotations' else None


def add_cvat(builder: Builder, image: Path, path: Path, entry: ElementTree.Element) -> None:
    """Add an image and its objects."""
    try:
        size = read_numbers(entry, ('width', 'height'))
    except ValueError:
        size = []
    size = builder.add_image(image, path, size)
    for shape in entry if size else ():
        name, kind = shape.get('label', '').strip(), shape.tag
        if kind not in SHAPES:
            what = 'labels of images' if kind == 'tag' else f'objects of the shape {kind}'
            builder.export.add_warning(f'{what}, not used', path, f'{name} in {entry.get("name")}')
            continue
        extras = {**shape.attrib, 'attribute': [*shape]}
        builder.export.note_unused('objects', extras, USED, path, f'{name} in {entry.get("name")}')
        try:
            add_cvat_shape(builder, name, shape, size)
        except ValueError as error:
            builder.add_fault('unreadable objects of CVAT', path, f'{kind} {name} of {entry.get("name")}: {error}')


def add_cvat_shape(builder: Builder, name: str, shape: ElementTree.Element, size: tuple[int, int]) -> None:
    """Add an object.

    Raises:
        ValueError: if it is unreadable.
    """
    turn = math.radians(float(shape.get('rotation') or 0))
    if shape.tag == 'box':
        x0, y0, x1, y1 = read_numbers(shape, ('xtl', 'ytl', 'xbr', 'ybr'))
        builder.add_object(name, compute_box(rotate([x0, y0, x1, y0, x1, y1, x0, y1], turn)))
    elif shape.tag == 'mask':
        x, y, w, h = map(int, read_numbers(shape, ('left', 'top', 'width', 'height')))
        runs = np.array([int(run) for run in shape.get('rle', '').split(',')])
        if runs.min() < 0 or runs.sum() != w * h:
            raise ValueError(f'the runs of its mask do not sum up to {w} x {h} pixels')
        part = np.repeat(np.arange(len(runs)) % 2, runs).reshape(h, w)
        builder.add_object(name, [], masks=[(x, y, part)])
    else:
        if shape.tag == 'ellipse':
            polygon = rotate(outline_ellipse(*read_numbers(shape, ('cx', 'cy', 'rx', 'ry'))), turn)
        else:
            polygon = [float(v) for point in shape.get('points', '').split(';') for v in point.split(',')]
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f'{len(polygon)} coordinates')
        polygon = clip(polygon, *size) if shape.tag == 'ellipse' else polygon
        builder.add_object(name, compute_box(polygon), [polygon])


def rotate(points: list[float], angle: float) -> list[float]:
    """Rotate points [x, y, x, y, ...] about the centre of their bounding box by an angle in radians."""
    if not angle:
        return points
    x, y, w, h = compute_box(points)
    offsets = np.reshape(points, (-1, 2)) - (x + w / 2, y + h / 2)
    cos, sin = math.cos(angle), math.sin(angle)
    return (offsets @ [[cos, sin], [-sin, cos]] + (x + w / 2, y + h / 2)).ravel().tolist()
