"""Reading annotation files: by one function, for the checks, the data sets, the evaluators and the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS
from pycocotools import mask as mask_utils

from ..errors import InputError
from .findings import Findings, Place
from .rules import fault_of_mask, fault_of_size, rasterised

REQUIRED = dict(
    images=dict(id=(int, str), file_name=str, height=int, width=int),
    annotations=dict(id=(int, str), image_id=(int, str), category_id=(int, str), bbox=list),
    categories=dict(id=(int, str), name=str),
)


def object_of(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object, of which Python would take the last value of several under one name."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the name "{name}" is there twice in one object')
    return content


def read_json(path: Path) -> object:
    """Any JSON file: in UTF-8, 16 or 32, with a byte order mark or without, whatever the locale is.

    Raises:
        InputError: if there is none, or it is damaged.
    """
    if not path.is_file():
        raise InputError(f'annotation file {path}: no such file')
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=object_of)
    except RecursionError as error:
        raise InputError(f'annotation file {path}: not JSON (its lists are nested too deep)') from error
    except ValueError as error:
        raise InputError(f'annotation file {path}: not JSON ({error})') from error
    except OSError as error:
        raise InputError(f'annotation file {path}: {error.strerror}') from error


def fault_of_entry(entry: dict, required: dict[str, type]) -> str:
    """What is wrong with the fields of an entry; '' where nothing is."""
    for name, kind in required.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f'the {name} {value!r:.40}' if name in entry else f'no {name}'
        if isinstance(value, str) and ('\0' in value or not value.isprintable() and not is_text(value)):
            return f'the {name} {value!r:.40}, which is no text'
    return ''


def is_text(value: str) -> bool:
    """Whether it can be written: JSON's escapes can hold half a character."""
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def sound_entries(coco: object, key: str, path: Path, found: Findings | None) -> list[dict]:
    """The entries under a key whose fields are there and of their type.

    Others are an InputError, or errors of ``found`` where it is given.
    """
    entries = coco.get(key) if isinstance(coco, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'annotation file {path}: not in COCO\'s format, it has no list of "{key}"')
    sound = []
    for position, entry in enumerate(entries):
        fault = fault_of_entry(entry, REQUIRED[key])
        if not fault:
            sound.append(entry)
            continue
        which = f'number {position + 1} of its "{key}"' + (f', id {entry["id"]!r:.40},' if 'id' in entry else '')
        fault = f'{which} has {fault}'
        if found is None or key == 'categories':
            raise InputError(f"annotation file {path}: not in COCO's format, {fault}")
        found.errors[f'entries of "{key}" that are not in COCO\'s format'].append(Place(path.name, detail=fault))
    return sound


def read_coco(path: Path, annotated: bool = True, found: Findings | None = None) -> dict:
    """Read an annotation file in COCO's format for instances.

    Args:
        path: a JSON file.
        annotated: whether annotations are needed; COCO's own test images come without.
        found: gets what was filled in, and the entries that are not in COCO's format, which are then left out.

    Returns:
        Its content: a dict with at least 'images', 'categories' of different names and, if needed, 'annotations', in
        which 'area', 'iscrowd', 'info' and 'licenses' are filled in where they are missing.

    Raises:
        InputError: if it does not exist, is not COCO JSON or has no classes to speak of.
    """
    content = read_json(path)
    coco = dict(content) if isinstance(content, dict) else content
    for key in REQUIRED:
        if key != 'annotations' or annotated or isinstance(coco, dict) and key in coco:
            sound = sound_entries(coco, key, path, found)
            coco[key] = sound
    if not coco['categories']:
        raise InputError(f'annotation file {path}: lists no categories')
    for name in ('id', 'name'):
        ((value, count),) = Counter(category[name] for category in coco['categories']).most_common(1)
        if count > 1:
            raise InputError(f'annotation file {path}: several of its categories have the {name} {value}')
    leave_out_placeholder(coco, path.name, found or Findings())
    fill_in(coco, path.name, found or Findings())
    return coco


def leave_out_placeholder(coco: dict, name: str, found: Findings) -> None:
    """Leave out Roboflow's category 0, the parent of all others, where no object is of it; changes ``coco``."""
    first, *others = sorted(coco['categories'], key=lambda category: category['id'] != 0)
    parents = {category.get('supercategory') for category in others}
    used = any(annotation['category_id'] == 0 for annotation in coco.get('annotations', ()))
    if first['id'] == 0 and parents == {first['name']} and not used:
        coco['categories'] = [category for category in coco['categories'] if category['id'] != 0]
        found.notes['placeholder categories of Roboflow, left out'].append(Place(name, detail=first['name']))


def fill_in(coco: dict, name: str, found: Findings) -> None:
    """Fill in what COCO has and others leave out; changes ``coco`` and notes it."""
    for key, value in (('info', {}), ('licenses', [])):
        if key not in coco:
            coco[key] = value
            found.notes[f'"{key}" is missing, and is taken to be empty'].append(Place(name))
    images = {image['id']: image for image in coco['images']}

    def filled(key: str, value: Callable[[dict], object], kind: str) -> None:
        for annotation in coco.get('annotations', ()):
            if annotation.get(key) is None:
                annotation[key] = value(annotation)
                image = images.get(annotation['image_id'], {})
                found.notes[kind].append(Place(name, image.get('file_name', ''), annotation['id']))

    filled('iscrowd', lambda annotation: 0, 'objects without "iscrowd", taken to be 0')
    filled(
        'area',
        lambda annotation: area(annotation, images.get(annotation['image_id'])),
        'objects without "area", taken to be that of the mask, or of the box where there is no mask',
    )


def area(annotation: dict, image: dict | None) -> float:
    """An object's area in square pixels: of its mask, or of its box where that is missing or faulty."""
    mask = annotation.get('segmentation')
    if image and not fault_of_size(image['width'], image['height']):
        size = image['width'], image['height']
        if not fault_of_mask(mask, *size):
            return float(mask_utils.area(rasterised(mask, *size)))
    box = annotation['bbox']
    try:
        return float(box[2] * box[3])
    except (IndexError, TypeError, OverflowError):  # a faulty box, which the checks name
        return 0.0


class AnnotationFile(COCO):
    """pycocotools' ``COCO`` of a file that is read by :func:`read_coco`, with ids that are numbers or text."""

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        if annotation_file is not None:
            self.dataset = read_coco(Path(annotation_file), annotated=False)
            with redirect_stdout(None):  # it tells that it does
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def getAnnIds(self, imgIds=(), catIds=(), areaRng=(), iscrowd=None):
        """As pycocotools has it, where a text is one id and not a list of letters."""
        return super().getAnnIds(as_list(imgIds), as_list(catIds), areaRng, iscrowd)

    def loadCats(self, ids=()):
        """As pycocotools has it, where a text is one id and not a list of letters."""
        return super().loadCats(as_list(ids))


def as_list(ids: object) -> object:
    return [ids] if isinstance(ids, str) else ids


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """MMDetection's CocoDataset that reads its annotation file by :func:`read_coco`."""

    COCOAPI = AnnotationFile
