"""Pascal VOC's XML, a file an image, and "CVAT for images 1.1", one XML file for all images."""

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

SHAPES = 'box', 'polygon', 'ellipse', 'mask'  # of CVAT


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file in the encoding that it declares, else in UTF-8 or, as labelImg on Windows, in Windows-1252.

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
    """The numbers in an element's attributes, or in its children.

    Raises:
        ValueError: where one is missing or no finite number.
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
    """A file of Pascal VOC's."""

    path: Path
    root: ElementTree.Element

    @property
    def size(self) -> list[float]:
        """The image's width and height as stated; [] where they are not."""
        try:
            return read_numbers(self.root.find('size'), ('width', 'height'))
        except (ValueError, AttributeError):
            return []


def read_voc(export: Export) -> list[Split] | None:
    """Read an export in Pascal VOC's format, None where it is in another one.

    Objects have boxes; those marked difficult become crowds, which are neither used for training nor counted.
    Coordinates count from 1, so 1 is subtracted, as MMDetection does, unless ``export.zero_based``. Label files and
    images have one name, and lie in Annotations/ and JPEGImages/ or side by side. The splits are those of
    ImageSets/Main, or of folders' names.
    """
    files = {}
    for path in export.list_files('.xml'):
        try:
            root = parse_xml(path)
        except InputError as error:
            export.used.add(path)
            export.add_error('XML files that cannot be read', path, str(error).partition(': ')[2])
            continue
        if root.tag == 'annotation':
            files[path] = VocFile(path, root)
    if not files:
        return None
    stated = {path: (file.root.findtext('filename') or '').strip() for path, file in files.items()}
    pairs = export.pair(export.images, list(files), stated)
    for path in files.keys() - set(pairs.values()) - export.used:  # of another name than its image
        if (image := export.find_image(stated[path], path)) and image not in pairs:
            pairs[image] = path
    for image, path in list(pairs.items()):
        other = export.find_image(stated[path], path) if stated[path] != image.name else None
        if other is not None and other != image:
            detail = f'<filename> is {stated[path]}, the image of the same name is {image.name}'
            export.add_error('XML files that name another image than theirs', path, detail)
            export.used.update((path, image))
            del pairs[image]
    for path in pairs.values() if not export.zero_based else ():
        export.add_note('XML files whose coordinates count from 1, which is subtracted (not with --zero-based)', path)
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
    for thing in file.root.findall('object'):
        name, box = (thing.findtext('name') or '').strip(), thing.find('bndbox')
        try:
            if not name or box is None:
                raise ValueError('an object without <name> or <bndbox>')
            x0, y0, x1, y1 = read_numbers(box, ('xmin', 'ymin', 'xmax', 'ymax'))
        except ValueError as error:
            builder.add_fault('objects of XML files that cannot be read', file.path, str(error))
            continue
        if first and min(x0, y0) < 1:
            kind = (
                'boxes that begin before pixel 1, where coordinates count from 1: if yours count from 0, --zero-based'
            )
            export.add_warning(kind, file.path, f'xmin {x0:g}, ymin {y0:g}')
        if thing.find('polygon') is not None:
            export.add_warning('objects with a <polygon>, of which the box alone is used', file.path, name)
        crowd = (thing.findtext('difficult') or '').strip() == '1'
        builder.add_object(name, [x0 - first, y0 - first, x1 - x0, y1 - y0], crowd=crowd)


def read_image_sets(export: Export, pairs: dict[Path, Path]) -> dict[str, list[Path]]:
    """The images of each split that the lists in ImageSets/Main name; {} where there are none.

    trainval.txt, or a list of another name, is what is still to be split. It is redundant beside train.txt and val.txt.
    """
    lists: dict[str, list[Path]] = {}
    for path in export.list_files('.txt'):
        if path.parent.name.lower() != 'main' or re.search(r'_(train|val|trainval|test)$', path.stem):
            continue  # others are lists of one class
        lists.setdefault(parse_split(path.stem) or WHOLE, []).append(path)
    if 'train' in lists and 'val' in lists:
        export.used.update(lists.pop(WHOLE, ()))
    elif WHOLE in lists:  # trainval.txt, of which train.txt or val.txt alone would be a part
        for split in ('train', 'val'):
            for path in lists.pop(split, ()):
                export.add_warning('lists beside one of all images, not used', path)
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
            names = [line, re.sub(r'\s+-?[01]$', '', line), re.sub(r'\.\w{3,4}$', '', line)]
            found = next((by_name[name] for name in names if name in by_name), [])
            if len(found) == 1:
                images[found[0]] = None
            else:
                export.add_error('entries of lists that name no image with an XML file, or several', path, line)
        splits[split] = list(images)
    return splits


# CVAT for images 1.1


def read_cvat(export: Export) -> list[Split] | None:
    """Read an export in "CVAT for images 1.1", None where it is in another format.

    Boxes, polygons, ellipses and masks are used; objects of other shapes are counted. The classes are those of the
    task, in its order; the splits are subsets that are named after one.
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
                f'{path}: is in "CVAT for video"; export it from CVAT as "CVAT for images 1.1" or "COCO 1.0"'
            )
        classes |= {label.findtext('name', '').strip(): None for label in root.findall('./meta//labels/label')}
        for entry in root.findall('image'):
            name, subset = entry.get('name', ''), entry.get('subset') or ''
            image = export.find_image(name, path.parent / 'images' / path.name, subset)
            split = parse_split(subset) or WHOLE
            if image is None:
                export.add_error(MISSING, path, name)
            elif split == WHOLE and subsets != {None}:
                export.add_warning('images of subsets that are neither train, val nor test, not used', image, subset)
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
        try:
            add_cvat_shape(builder, name, shape, size)
        except ValueError as error:
            builder.add_fault(
                'objects of CVAT that cannot be read', path, f'{kind} {name} of {entry.get("name")}: {error}'
            )


def add_cvat_shape(builder: Builder, name: str, shape: ElementTree.Element, size: tuple[int, int]) -> None:
    """Add an object.

    Raises:
        ValueError: if it cannot be read.
    """
    turn = math.radians(float(shape.get('rotation') or 0))
    if shape.tag == 'box':
        x0, y0, x1, y1 = read_numbers(shape, ('xtl', 'ytl', 'xbr', 'ybr'))
        builder.add_object(name, compute_box(rotate([x0, y0, x1, y0, x1, y1, x0, y1], turn)))
    elif shape.tag == 'mask':
        x, y, w, h = map(int, read_numbers(shape, ('left', 'top', 'width', 'height')))
        runs = np.array([int(run) for run in shape.get('rle', '').split(',')])
        if runs.min() < 0 or runs.sum() != w * h:
            raise ValueError(f'its runs do not make up {w} x {h} pixels')
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
    """Points [x, y, x, y, ...] turned about the centre of the box around them, in radians."""
    if not angle:
        return points
    x, y, w, h = compute_box(points)
    offsets = np.reshape(points, (-1, 2)) - (x + w / 2, y + h / 2)
    cos, sin = math.cos(angle), math.sin(angle)
    return (offsets @ [[cos, sin], [-sin, cos]] + (x + w / 2, y + h / 2)).ravel().tolist()
