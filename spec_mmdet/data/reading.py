"""Read annotation files, once per process, for the checks, data sets, evaluators and reports."""

from __future__ import annotations

import copy
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS
from mmengine.dist import is_main_process
from pycocotools import mask as mask_utils

from ..errors import InputError
from ..status import show_status
from .findings import Findings, Place
from .rules import find_mask_fault, find_size_fault, rasterise

LARGE = 30e6  # bytes of a file whose reading takes about a second
REQUIRED = dict(
    images=dict(id=(int, str), file_name=str, height=int, width=int),
    annotations=dict(id=(int, str), image_id=(int, str), category_id=(int, str), bbox=list),
    categories=dict(id=(int, str), name=str),
)


def build_object(pairs: list[tuple[str, object]]) -> dict:
    """Build a JSON object; unlike Python, reject duplicate names."""
    content = dict(pairs)
    if len(content) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the name "{name}" occurs twice in one object')
    return content


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Disable Python's garbage collector, which would double the time to read large JSON files."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def announce(what: str, path: Path) -> None:
    """Print in the main process what takes seconds with a large file."""
    if path.is_file() and path.stat().st_size > LARGE and is_main_process():
        print(f'{what} {path.name} ({path.stat().st_size / 1e6:.0f} MB)', flush=True)


def read_json(path: Path) -> object:
    """Read a JSON file in UTF-8, 16 or 32, with or without a byte order mark, independently of the locale.

    Raises:
        InputError: if the file does not exist or is not JSON.
    """
    if not path.is_file():
        raise InputError(f'annotation file {path}: no such file. Check the path')
    announce('reading', path)
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=build_object)
    except RecursionError as error:
        raise InputError(f'annotation file {path}: not JSON (nested too deeply). Use an intact file') from error
    except ValueError as error:
        raise InputError(f'annotation file {path}: not JSON ({error}). Use an intact file') from error
    except OSError as error:
        raise InputError(f'annotation file {path}: cannot be read ({error.strerror}). Check its permissions') from error


def find_entry_fault(entry: dict, required: dict[str, type]) -> str:
    """Describe the first missing or mistyped field of an entry; '' for a valid entry."""
    for name, kind in required.items():
        value = entry.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f'the {name} {value!r:.40}' if name in entry else f'no {name}'
        if isinstance(value, str) and ('\0' in value or not value.isprintable() and not is_text(value)):
            return f'the {name} {value!r:.40}, which is not valid text'
    return ''


def is_text(value: str) -> bool:
    """Return whether a string can be encoded; JSON's escapes can denote unpaired surrogates."""
    try:
        return bool(value.encode())
    except UnicodeEncodeError:
        return False


def list_entries(coco: object, key: str, path: Path) -> list[dict]:
    """Return the list under a key of a file's content; raise InputError if there is none."""
    entries = coco.get(key) if isinstance(coco, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'annotation file {path}: not in COCO\'s format: it has no list "{key}". Correct it')
    return entries


def select_sound_entries(coco: object, key: str, path: Path, found: Findings | None) -> list[dict]:
    """Return the entries under a key with all required fields; others are added to ``found``, or raise InputError."""
    sound = []
    for position, entry in enumerate(list_entries(coco, key, path)):
        fault = find_entry_fault(entry, REQUIRED[key])
        if not fault:
            sound.append(entry)
            continue
        which = f'number {position + 1} of its "{key}"' + (f', id {entry["id"]!r:.40},' if 'id' in entry else '')
        fault = f'{which} has {fault}'
        if found is None or key == 'categories':
            raise InputError(f"annotation file {path}: not in COCO's format: {fault}. Correct it")
        found.errors[f'entries of "{key}" that are not in COCO\'s format'].append(Place(path.name, detail=fault))
    return sound


def read_coco(path: Path, annotated: bool = True, found: Findings | None = None) -> dict:
    """Read an annotation file in COCO's format for instances.

    Args:
        path: a JSON file.
        annotated: whether annotations are needed; COCO's test images have none.
        found: receives filled-in fields, and invalid entries, which are then left out.

    Returns:
        A dict with at least 'images', 'categories' of different names and, if needed, 'annotations'. Missing 'area',
        'iscrowd', 'info' and 'licenses' are filled in.

    Raises:
        InputError: if the file does not exist, is not COCO JSON or has no classes.
    """
    with pause_garbage_collection():
        return check_layout(read_json(path), path, annotated, found)


def check_layout(content: object, path: Path, annotated: bool, found: Findings | None) -> dict:
    """Check and complete a JSON file's content; see :func:`read_coco` for arguments, result and errors."""
    coco = dict(content) if isinstance(content, dict) else content
    for key in REQUIRED:
        if key != 'annotations' or annotated or isinstance(coco, dict) and key in coco:
            sound = select_sound_entries(coco, key, path, found)
            coco[key] = sound
    if not coco['categories']:
        raise InputError(f'annotation file {path}: contains no categories. Add them')
    for name in ('id', 'name'):
        ((value, count),) = Counter(category[name] for category in coco['categories']).most_common(1)
        if count > 1:
            raise InputError(f'annotation file {path}: several categories have the {name} {value}. Make them unique')
    leave_out_placeholder(coco, path.name, found or Findings())
    fill_in(coco, path.name, found or Findings())
    return coco


def leave_out_placeholder(coco: dict, name: str, found: Findings) -> None:
    """Leave out Roboflow's category 0, the parent of all others, if it has no objects; changes ``coco``."""
    first, *others = sorted(coco['categories'], key=lambda category: category['id'] != 0)
    parents = {category.get('supercategory') for category in others}
    used = any(annotation['category_id'] == 0 for annotation in coco.get('annotations', ()))
    if first['id'] == 0 and parents == {first['name']} and not used:
        coco['categories'] = [category for category in coco['categories'] if category['id'] != 0]
        found.notes['placeholder categories of Roboflow, left out'].append(Place(name, detail=first['name']))


def fill_in(coco: dict, name: str, found: Findings) -> None:
    """Fill in fields that some tools omit, and add notes to ``found``; changes ``coco``."""
    for key, value in (('info', {}), ('licenses', [])):
        if key not in coco:
            coco[key] = value
            found.notes[f'"{key}" is missing, set to empty'].append(Place(name))
    images = {image['id']: image for image in coco['images']}

    def filled(key: str, value: Callable[[dict], object], kind: str) -> None:
        for annotation in coco.get('annotations', ()):
            if annotation.get(key) is None:
                annotation[key] = value(annotation)
                image = images.get(annotation['image_id'], {})
                found.notes[kind].append(Place(name, image.get('file_name', ''), annotation['id']))

    filled('iscrowd', lambda annotation: 0, 'objects without "iscrowd", set to 0')
    filled(
        'area',
        lambda annotation: compute_object_area(annotation, images.get(annotation['image_id'])),
        'objects without "area", set to that of the mask, or of the box if there is no mask',
    )


def compute_object_area(annotation: dict, image: dict | None) -> float:
    """Compute an object's area in square pixels, from its mask or, if that is missing or faulty, from its box."""
    mask = annotation.get('segmentation')
    if image and not find_size_fault(image['width'], image['height']):
        size = image['width'], image['height']
        if not find_mask_fault(mask, *size):
            return float(mask_utils.area(rasterise(mask, *size)))
    box = annotation['bbox']
    try:
        return float(box[2] * box[3])
    except (IndexError, TypeError, OverflowError):  # a faulty box, which the checks report
        return 0.0


# Files that were read, by path: size and modification time, content, findings.
_shared: dict[Path, tuple[tuple[int, int], dict, Findings]] = {}


@show_status('reading annotations')
def share_coco(path: Path, annotated: bool = True, found: Findings | None = None) -> dict:
    """Read an annotation file with :func:`read_coco`, or return the result of an earlier call if it is unchanged.

    Do not change the content, which is shared. It stays in memory until :func:`forget_coco`.
    """
    path = path.resolve()
    state = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (0, 0)
    if path not in _shared or _shared[path][0] != state:
        _shared.pop(path, None)
        new = Findings()
        coco = read_coco(path, False, new)
        if new.errors:
            if found is None:
                raise InputError(new.describe_first_error())
            found.update(new)
            return coco
        _shared[path] = state, coco, new
    _, coco, earlier = _shared[path]
    if annotated:
        list_entries(coco, 'annotations', path)
    if found is not None:
        found.update(earlier)
    return coco


def forget_coco(path: str | Path) -> None:
    """Free the memory of a file that :func:`share_coco` read."""
    _shared.pop(Path(path).resolve(), None)


def number_ids(ids: list[int | str], least: int = 0, ascending: bool = False) -> dict[int | str, int]:
    """Map all ids to new numbers, if the evaluators do not accept one of them; otherwise return {}.

    The new numbers are above all numeric ids, so that none is both an old and a new id.

    The evaluators store ids as int64 and float64, use an annotation's id of 0 for "no match", and sort classes by id.
    """
    plain = [index for index in ids if type(index) is int and least <= index < 2**53]
    if len(plain) == len(ids) and not (ascending and ids != sorted(ids)):
        return {}
    start = max((index for index in plain if index < 2**52), default=0) + 1
    return {index: start + place for place, index in enumerate(dict.fromkeys(ids))}


class AnnotationFile(COCO):
    """pycocotools' ``COCO`` of a file that :func:`share_coco` reads, with ids that its evaluators accept.

    Other ids (text, above 2**53, negative, an annotation's 0) are replaced here, and only here, by numbers in the order
    of the file that differ from all its ids. :meth:`loadRes` accepts detections with the file's ids.
    :meth:`get_original` returns the file's id of a number, for written results.

    Attributes:
        numbers: for each of 'images', 'annotations' and 'categories', numbers by the file's ids; {} if unchanged.
    """

    def __init__(self, annotation_file: str | None = None) -> None:
        super().__init__()
        self.numbers: dict[str, dict[int | str, int]] = {}
        if annotation_file is not None:
            with pause_garbage_collection(), redirect_stdout(None):  # pycocotools prints its progress
                self.dataset = self._number(share_coco(Path(annotation_file), annotated=False))
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def _number(self, coco: dict) -> dict:
        """Return a file's content with numbers as ids; ``coco`` itself if they need no change."""
        entries = {key: coco.get(key, []) for key in REQUIRED}
        rules = dict(images={}, annotations=dict(least=1), categories=dict(ascending=True))
        self.numbers = {k: number_ids([entry['id'] for entry in entries[k]], **rules[k]) for k in entries}
        self._originals = {key: {n: index for index, n in numbers.items()} for key, numbers in self.numbers.items()}
        if not any(self.numbers.values()):
            return coco
        fields = dict(image_id='images', category_id='categories')

        def renumber(key: str, entry: dict) -> dict:
            new = {field: self.number(kind, entry[field]) for field, kind in fields.items() if field in entry}
            return {**entry, 'id': self.number(key, entry['id']), **new}

        return {**coco, **{key: [renumber(key, entry) for entry in entries[key]] for key in entries if key in coco}}

    def number(self, key: str, index: int | str) -> int | str:
        """Return the number of the file's id ``index`` of 'images', 'annotations' or 'categories' (``key``)."""
        return self.numbers.get(key, {}).get(index, index)

    def get_original(self, key: str, number: int) -> int | str:
        """Return the file's id of a number; the inverse of :meth:`number`."""
        return self._originals[key].get(number, number) if self.numbers else number

    @cached_property
    def changeable(self) -> AnnotationFile:
        """A copy for evaluations, which overwrite "ignore" and masks of the annotations."""
        result = copy.copy(self)
        result.dataset = {**self.dataset, 'annotations': [dict(entry) for entry in self.dataset.get('annotations', ())]}
        with pause_garbage_collection(), redirect_stdout(None):
            result.createIndex()
        result.changeable = result
        return result

    def number_detections(self, results: list[dict]) -> None:
        """Replace the file's ids by numbers in detections in COCO's results format; changes ``results``.

        Raises:
            InputError: if the file does not contain the image of a detection.
        """
        for result in results:
            result['image_id'] = self.number('images', result['image_id'])
            result['category_id'] = self.number('categories', result['category_id'])
            if result['image_id'] not in self.imgs:
                raise InputError(
                    f'the detections contain an image {result["image_id"]!r:.40}, which is not in the annotation file. '
                    'Evaluate them on their own annotation file'
                )

    def loadRes(self, results: list[dict]) -> COCO:
        """Index detections, or an empty list; see :meth:`number_detections`."""
        self.number_detections(results)
        with pause_garbage_collection(), redirect_stdout(None):
            if results:
                return super().loadRes(results)
            found = COCO()  # pycocotools fails for an empty list
            found.dataset = dict(self.dataset, annotations=[])
            found.createIndex()
        return found


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """MMDetection's CocoDataset that reads its annotation file with :func:`read_coco`, with any ids and encoding."""

    COCOAPI = AnnotationFile

    def load_data_list(self) -> list[dict]:
        """Load the annotations, and free the memory of those for training, which nothing else uses."""
        announce('indexing', Path(self.ann_file))
        with pause_garbage_collection():
            entries = super().load_data_list()
        if not self.test_mode:
            forget_coco(self.ann_file)
        return entries
