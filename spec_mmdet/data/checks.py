"""The checks of data sets, before a run and by ``spec-mmdet prepare``."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import mmcv
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ..errors import InputError, some
from .fitting import coco_datasets, evaluators, has_masks

TOLERANCE = 2.0  # pixels: tools round, and COCO's own boxes and polygons touch the border
EXIF_ORIENTATION = 0x0112
Image.MAX_IMAGE_PIXELS = None  # large images are expected here


@dataclass
class Findings:
    """What is wrong, by kind: where each case of it was found."""

    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def print(self) -> None:
        for title, kinds in (('errors, to be put right', self.errors), ('warnings', self.warnings)):
            if kinds:
                print(f'\n{title}:')
            for kind, where in kinds.items():
                print(f'{len(where):>8}  {kind}; first: {where[0]}')


def are_numbers(values: object) -> bool:
    """Whether this is a list of finite numbers: JSON's parser takes NaN and Infinity too."""
    return isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def outside(xs: Sequence[float], ys: Sequence[float], width: float, height: float) -> bool:
    low, high = -TOLERANCE, TOLERANCE
    return min(*xs, *ys) < low or max(xs) > width + high or max(ys) > height + high


def fault_of_box(box: list, width: float, height: float) -> str:
    """What is wrong with a box [x, y, width, height] in an image of this size, in pixels; '' where nothing is."""
    if not are_numbers(box) or len(box) != 4:
        return 'boxes that are not four finite numbers [x, y, width, height]'
    x, y, w, h = box
    if w < 0 or h < 0:
        return 'boxes of negative width or height'
    return 'boxes that reach out of their image' if outside((x, x + w), (y, y + h), width, height) else ''


def fault_of_mask(mask: object, width: float, height: float) -> str:
    """What is wrong with a segmentation in an image of this size, in pixels; '' where nothing is."""
    if not mask:
        return 'objects without a mask ("segmentation"), which Mask R-CNN learns from'
    if isinstance(mask, list):
        for polygon in mask:
            if not are_numbers(polygon):
                return 'polygons that are not lists [x, y, x, y, ...] of finite numbers'
            if len(polygon) < 6 or len(polygon) % 2:
                return 'polygons of fewer than 6 coordinates or an odd number of them'
            if outside(polygon[::2], polygon[1::2], width, height):
                return 'polygons that reach out of their image'
        return ''
    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), list | str):
        return 'masks that are neither polygons nor RLE'
    if mask.get('size') != [height, width]:
        return 'RLE masks whose size [height, width] is not that of their image'
    counts = mask['counts']
    if isinstance(counts, list):
        whole = are_numbers(counts) and len(counts) > 1 and min(counts) >= 0 and sum(counts) == width * height
    else:
        try:
            whole = mask_utils.decode(mask).any()
        except ValueError:
            whole = False
    return '' if whole else 'RLE masks that are empty or whose runs do not make up their image'


def is_used(annotation: dict) -> bool:
    """Whether MMDetection makes use of an object: without a word it leaves out the small and those without an area."""
    box = annotation['bbox']
    return not fault_of_box(box, math.inf, math.inf) and min(box[2:]) >= 1 and annotation['area'] > 0


def check_annotations(coco: dict, name: str, found: Findings) -> None:
    """Check what an annotation file says of its images and objects, the images themselves not being looked at.

    Args:
        coco: its content, from :func:`read_coco`.
        name: what to call it.
        found: what is wrong is added here.
    """
    errors, warnings = found.errors, found.warnings
    for key in ('images', 'annotations'):
        for index, count in Counter(entry['id'] for entry in coco[key]).items():
            if count > 1:
                errors[f'ids that several {key} have'].append(f'{index} in {name}')
    for image in coco['images']:
        path = Path(image['file_name'])
        if path.is_absolute() or '..' in path.parts:
            errors['file names that lead out of the image folder'].append(f'{image["file_name"]} in {name}')

    images = {image['id']: image for image in coco['images']}
    categories = {category['id'] for category in coco['categories']}
    for annotation in coco['annotations']:
        where = f'annotation {annotation["id"]} in {name}'
        image = images.get(annotation['image_id'])
        if image is None:
            errors['annotations of an image_id that no image has'].append(where)
            continue
        where = f'annotation {annotation["id"]} of {image["file_name"]} in {name}'
        if annotation['category_id'] not in categories:
            errors['annotations of a category_id that no category has'].append(where)
        fault = fault_of_box(annotation['bbox'], image['width'], image['height'])
        if fault:
            errors[fault].append(where)
        elif not is_used(annotation):
            if min(annotation['bbox'][2:]) < 1:  # COCO has a few
                warnings['boxes narrower or lower than a pixel, which MMDetection leaves out'].append(where)
            else:
                errors['objects whose "area" is not above 0, which MMDetection leaves out'].append(where)
        fault = fault_of_mask(annotation.get('segmentation'), image['width'], image['height'])
        if fault:
            errors[fault].append(where)


def check_contents(coco: dict, name: str, found: Findings) -> None:
    """Check that a split has something to learn or to be measured on in each of its classes and images."""
    used = [annotation for annotation in coco['annotations'] if is_used(annotation)]
    categories, images = ({annotation[key] for annotation in used} for key in ('category_id', 'image_id'))
    for category in coco['categories']:
        if category['id'] not in categories:
            found.warnings['classes without an object'].append(f'{category["name"]} in {name}')
    for image in coco['images']:
        if image['id'] not in images:
            found.warnings['images without an object'].append(f'{image["file_name"]} in {name}')
    if not used:
        found.errors['splits without an object'].append(name)


def check_image(path: Path, height: float, width: float) -> tuple[str, str, bytes]:
    """Decode an image as the training will, and by PIL, which minds a missing end where an older OpenCV does not.

    MMDetection turns images as their EXIF orientation says, and so do the tools that people label with; then the size
    in the annotation file is that of the turned image.

    Returns:
        What is wrong, what may be, and a digest of the file's content.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return 'images that are not there', '', b''
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            turned = image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1)
        size = mmcv.imfrombytes(content).shape[:2]
    except Exception:  # a damaged file can make the decoders raise anything
        return 'images that cannot be decoded to their end', '', b''
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if size == (height, width):
        doubt = 'images with an EXIF orientation, which training follows: were they labelled as turned by it?'
        return '', doubt if turned else '', digest
    if turned and size == (width, height):
        return 'images that their EXIF orientation turns, but their labels do not: save them turned', '', digest
    return 'images of another size than the annotation file says', '', digest


def check_images(coco: dict, folder: Path, name: str, found: Findings) -> dict[bytes, str]:
    """Decode all images of an annotation file.

    Args:
        coco: its content.
        folder: where the images are.
        name: what to call it.
        found: what is wrong is added here.

    Returns:
        The name of the image of each digest.
    """
    images, digests = coco['images'], {}
    with ThreadPoolExecutor() as pool:  # decoding lets go of Python's lock
        results = pool.map(
            lambda image: check_image(folder / image['file_name'], image['height'], image['width']), images
        )
        for (error, warning, digest), image in zip(tqdm(results, name, len(images)), images):
            where = f'{image["file_name"]} in {folder}'
            if error:
                found.errors[error].append(where)
            if warning:
                found.warnings[warning].append(where)
            if digest in digests:
                found.warnings['images that are there twice'].append(f'{where}, which is {digests[digest]}')
            if digest:
                digests[digest] = image['file_name']
    return digests


def read_coco(path: Path, annotated: bool = True) -> dict:
    """Read an annotation file in COCO's format for instances.

    Args:
        path: a JSON file.
        annotated: whether annotations are needed; COCO's own test images come without.

    Returns:
        Its content: a dict with at least 'images', 'categories' of different names and, if needed, 'annotations'.

    Raises:
        InputError: if it does not exist, is not COCO JSON or has no classes to speak of.
    """
    if not path.is_file():
        raise InputError(f'annotation file {path}: no such file')
    try:
        coco = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f'annotation file {path}: not JSON ({error})') from error
    index, number = (int, str), (int, float)
    required = dict(
        images=dict(id=index, file_name=str, height=int, width=int),
        annotations=dict(id=index, image_id=index, category_id=index, bbox=list, area=number, iscrowd=int),
        categories=dict(id=index, name=str),
    )
    if not annotated:
        del required['annotations']
    for key, fields in required.items():
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f'annotation file {path}: not in COCO\'s format, it has no list of "{key}"')
        for entry in entries:
            for name, kind in fields.items():
                if not isinstance(entry.get(name), kind):
                    fault = f'the {name} {entry[name]!r:.40}' if name in entry else f'no {name}'
                    raise InputError(f'annotation file {path}: not in COCO\'s format, one of its "{key}" has {fault}')
    for name in ('id', 'name'):
        values = [category[name] for category in coco['categories']]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise InputError(f'annotation file {path}: several of its categories have the {name} {twice}')
    if not coco['categories']:
        raise InputError(f'annotation file {path}: lists no categories')
    return coco


def check_categories(ann_file: Path, categories: Sequence[str], classes: Sequence[str]) -> None:
    """Check that an annotation file has the classes trained for: MMDetection numbers labels by each file's own order.

    Raises:
        InputError: if not.
    """
    if list(categories) == list(classes):
        return
    lacking, besides = ([n for n in a if n not in b] for a, b in ((classes, categories), (categories, classes)))
    faults = [f'it lacks {some(lacking)}'] * bool(lacking) + [f'it has {some(besides)} besides'] * bool(besides)
    raise InputError(
        f'annotation file {ann_file}: its categories are not the {len(classes)} classes trained for '
        f"({' and '.join(faults) or 'they are in another order'}). Give it the list of categories of the training's "
        'annotation file.'
    )


def check_dataset(
    dataset: dict, annotated: bool = True, classes: Sequence[str] | None = None, masks: bool = False
) -> list[str] | None:
    """Check that a CocoDataset's annotations, images and classes are there and agree.

    Args:
        dataset: its config.
        annotated: whether annotations are needed.
        classes: what its categories must be, if that is known.
        masks: whether masks are needed.

    Returns:
        Its classes in the file's order: all of its categories, or those that the config names;
        None for a data set that is not on this machine.

    Raises:
        InputError: if not.
    """
    if not isinstance(dataset['ann_file'], str):
        raise InputError(
            f'ann_file {dataset["ann_file"]} in the config: a CocoDataset has one annotation file. For several, make '
            "the data set dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', ...), ...])"
        )
    root = Path(dataset.get('data_root') or '')
    ann_file, folder = root / dataset['ann_file'], root / dataset['data_prefix']['img']
    if '://' in str(dataset.get('data_root')) + dataset['ann_file']:
        return None  # a remote store, which only mmengine's file client can read
    if not folder.is_dir():
        raise InputError(f'image folder {folder}: no such folder')
    coco = read_coco(ann_file, annotated)
    names = [image['file_name'] for image in coco['images']]
    present = {entry.name for entry in folder.iterdir()}
    absent = [name for name in names if name not in present and not (folder / name).is_file()]
    if not names:
        raise InputError(f'annotation file {ann_file}: lists no images')
    if absent:
        raise InputError(f'image folder {folder}: lacks {len(absent)} of the {len(names)} images, first {absent[0]}')

    if masks and annotated and not any(annotation.get('segmentation') for annotation in coco['annotations']):
        raise InputError(
            f'annotation file {ann_file}: its objects have boxes alone, no masks ("segmentation"), which this detector '
            'learns from. Take one that finds boxes: spec-mmdet train xcit_spec_fasterrcnn'
        )

    categories = [category['name'] for category in coco['categories']]
    named = (dataset.get('metainfo') or {}).get('classes')
    if named:  # by a config that takes some of the file's classes
        categories = [name for name in categories if name in named]
    check_categories(ann_file, categories, classes or named or categories)
    return categories


def check_inputs(cfg: Config, loops: Sequence[str], classes: Sequence[str] | None = None) -> Sequence[str] | None:
    """Check the data that a run will read, each file once.

    Args:
        cfg: the whole config, command line options merged.
        loops: which parts the run uses, of 'train', 'val' and 'test'.
        classes: what all annotation files must hold; by default what the first of them holds.

    Returns:
        The classes, if they are known in the end: no file of a remote store is read.

    Raises:
        InputError: on the first thing that is missing or does not fit.
    """
    checked = []
    for loop in loops:
        for evaluator in evaluators(cfg, loop):
            ann_file = evaluator.get('ann_file')
            if ann_file and '://' not in ann_file and not Path(ann_file).is_file():
                raise InputError(f'annotation file {ann_file}: no such file ({loop}_evaluator.ann_file in the config)')
        annotated = not any(evaluator.get('format_only') for evaluator in evaluators(cfg, loop))
        for dataset in coco_datasets(cfg.get(f'{loop}_dataloader')):
            source = {key: dataset.get(key) for key in ('data_root', 'ann_file', 'data_prefix')}
            if source not in checked:
                classes = check_dataset(dataset, annotated, classes, has_masks(cfg.get('model'))) or classes
                checked.append(source)
    return classes
