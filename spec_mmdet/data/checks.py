"""Check data sets, in ``spec-mmdet prepare`` and before training and testing; the rules are in :mod:`rules`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mmdet.registry import DATASETS
from mmengine.config import Config
from tqdm import tqdm

from ..errors import InputError, list_briefly
from ..status import show_status
from . import rules
from .findings import Findings, Place
from .fitting import (
    has_masks,
    is_kind_of,
    list_coco_datasets,
    list_coco_metrics,
    list_evaluators,
    list_stated_classes,
    walk,
)
from .images import check_images
from .reading import CheckedCocoDataset, forget_coco, share_coco

FILTER = MappingProxyType(dict(filter_empty_gt=True, min_size=32))  # COCO's configs
# Detections that MMDetection's configs keep per image, and that COCO's AP counts per image and class.
LIMITS = MappingProxyType({'model.test_cfg.rcnn.max_per_img': 100, 'test_evaluator.proposal_nums': 100})
PORTION = 20_000  # annotations that are checked together, which needs memory
LOOKED_AT = 500  # maximum number of images that train and test decode before they start
ADVICE = (
    'Run "spec-mmdet prepare" for the full list, "spec-mmdet prepare --drop" to write a copy without faulty items, or '
    'pass --no-check'
)


def check_annotations(
    coco: dict, name: str, found: Findings, masks: bool | None = None, classes: Sequence[str] | None = None
) -> None:
    """Check the entries of an annotation file, without its images.

    Args:
        coco: the content, from :func:`read_coco`.
        name: the file's name in findings.
        found: receives the faults.
        masks: whether masks are needed; None accepts a file without any mask.
        classes: classes in use; objects of others are not checked. By default all.
    """
    check_ids(coco, name, found)
    for position, image in enumerate(coco['images']):
        path = Path(image['file_name'])
        fault = rules.find_size_fault(image['width'], image['height'])
        if path.is_absolute() or '..' in path.parts:
            fault = 'file names outside of the image folder'
        if fault:
            found.errors[fault].append(Place(name, image['file_name']))
            found.faulty_images[name].add(position)

    if masks is None and not any(annotation.get('segmentation') for annotation in coco['annotations']):
        masks = False
        found.notes['files without masks, usable only for detectors of boxes'].append(Place(name))
    images = {image['id']: image for image in coco['images']}
    categories = {category['id']: category['name'] for category in coco['categories']}
    sizes = {key: (i['width'], i['height']) for key, i in images.items()}
    sizes = {key: size for key, size in sizes.items() if not rules.find_size_fault(*size)}
    annotations, sound = coco['annotations'], set()
    for start in range(0, len(annotations), PORTION) if masks is not False else ():
        portion = annotations[start : start + PORTION]
        sound |= {start + place for place in rules.find_sound_objects(portion, sizes)}
    annotations = tqdm(annotations, f'annotations of {name}', leave=False, disable=None, delay=1)
    for position, annotation in enumerate(annotations):
        image, category = images.get(annotation['image_id']), categories.get(annotation['category_id'])
        if image is None:
            fault, doubt = 'annotations with an unknown image_id', ''
        elif category is None:
            fault, doubt = 'annotations with an unknown category_id', ''
        elif classes is not None and category not in classes or position in sound:
            continue
        else:
            fault, doubt = check_object(annotation, image, masks is not False)
        for kinds, kind in ((found.errors, fault), (found.warnings, doubt)):
            if kind:
                kinds[kind].append(Place(name, '' if image is None else image['file_name'], annotation['id']))
        if fault:
            found.faulty_annotations[name].add(position)


def check_ids(coco: dict, name: str, found: Findings) -> None:
    """Check that the ids of images and of annotations are unique; the first of several equal ones is valid."""
    for key, faulty in (('images', found.faulty_images), ('annotations', found.faulty_annotations)):
        seen = set()
        for position, entry in enumerate(coco[key]):
            if entry['id'] in seen:
                found.errors[f'duplicate ids of {key}'].append(Place(name, detail=f'id {entry["id"]}'))
                faulty[name].add(position)
            seen.add(entry['id'])


def check_object(annotation: dict, image: dict, with_mask: bool) -> tuple[str, str]:
    """Return the error and the warning of an object, or '' for each if there is none."""
    size = image['width'], image['height']
    if rules.find_size_fault(*size):
        return '', ''  # reported for the image
    box, mask = annotation['bbox'], annotation.get('segmentation')
    fault = rules.find_box_fault(box, *size) or rules.find_area_fault(annotation['area'], box)
    fault = fault or rules.find_crowd_fault(annotation['iscrowd'])
    if not fault and with_mask:
        missing = 'objects without a mask ("segmentation"), which Mask R-CNN needs'
        fault = rules.find_mask_fault(mask, *size) if mask else missing
    if fault:
        return fault, ''
    doubt = rules.explain_exclusion(annotation)
    if with_mask and min(box[2:]) >= 1:
        fault, of_mask = rules.compare_mask_and_box(mask, box, *size)
        doubt = doubt or of_mask
    return fault, doubt


@show_status('checking annotations')
def check_contents(
    coco: dict,
    name: str,
    found: Findings,
    training: bool,
    classes: Sequence[str] | None = None,
    filter_cfg: Mapping = FILTER,
    limits: Mapping[str, int] = LIMITS,
) -> None:
    """Check that a split has objects for training, or for evaluation, in each of its classes and images.

    Args:
        coco: the split's content, without errors.
        name: the split's name in findings.
        found: receives the faults.
        training: whether it is used for training or for evaluation.
        classes: classes in use; by default all.
        filter_cfg: CocoDataset's setting of images to leave out of training; by default that of COCO's configs.
        limits: see :func:`find_limits`; by default those of COCO's configs.
    """
    names = {category['id']: category['name'] for category in coco['categories']}
    taken = [a for a in coco['annotations'] if classes is None or names[a['category_id']] in classes]
    with_objects = {annotation['image_id'] for annotation in taken}
    left_out = set()
    for image in coco['images'] if training else ():
        if reason := rules.explain_image_exclusion(image, image['id'] in with_objects, filter_cfg):
            found.warnings[reason].append(Place(name, image['file_name']))
            left_out.add(image['id'])
    if training:
        used = [a for a in taken if not rules.explain_exclusion(a) and a['image_id'] not in left_out]
    else:
        used = [a for a in taken if rules.is_measured(a)]
    if not any(min(annotation['bbox'][2:]) >= 1 for annotation in used):
        what = 'training' if training else 'evaluation'
        found.errors[f'splits without an object for {what}'].append(
            Place(name, detail=f'0 of {len(taken)} annotations')
        )

    check_numbers(coco, taken, name, found, limits)
    categories, images = ({annotation[key] for annotation in used} for key in ('category_id', 'image_id'))
    for category in coco['categories']:
        if category['id'] not in categories and (classes is None or category['name'] in classes):
            found.warnings['classes without an object'].append(Place(name, detail=category['name']))
    for image in coco['images']:
        if image['id'] not in images and image['id'] not in left_out:
            found.warnings['images without an object'].append(Place(name, image['file_name']))


def check_numbers(coco: dict, objects: list[dict], name: str, found: Findings, limits: Mapping[str, int]) -> None:
    """Warn about images with more objects than are detected per image, or evaluated per image and class."""
    per_image = Counter(annotation['image_id'] for annotation in objects)
    per_class: dict[object, int] = {}  # the number of objects of an image's most frequent class
    for (image, _), number in Counter((a['image_id'], a['category_id']) for a in objects).items():
        per_class[image] = max(number, per_class.get(image, 0))
    exceeded, places = set(), []
    for image in coco['images']:
        number = per_image[image['id']]
        over = {
            setting
            for setting, limit in limits.items()
            if (number if setting.startswith('model') else per_class.get(image['id'], 0)) > limit
        }
        if over:
            exceeded |= over
            places.append(Place(name, image['file_name'], detail=f'{number} objects'))
    if places:
        least = min(limits[setting] for setting in exceeded)
        options = ' '.join(f'{s}={"N" if s.startswith("model") else "1,10,N"}' for s in limits if s in exceeded)
        found.warnings[
            f'images with more than {least} objects, of which the rest is never detected or counted in AP. Raise the '
            f'limit: --cfg-options {options}'
        ] += places


def find_limits(cfg: Config, loop: str) -> dict[str, int]:
    """Return the limits of detections, of the model per image and of AP per image and class, by their settings.

    AP is evaluated at 100 detections unless ``proposal_nums`` leaves out 100 (see ``CheckedCocoMetric``).
    """
    limits = {
        f'model.test_cfg.{name}.{key}'.replace('..', '.'): node[key]
        for name, node in walk(((cfg.get('model') or {}).get('test_cfg')) or {})
        for key in ('max_per_img', 'max_per_image')
        if isinstance(node.get(key), int) and node[key] > 0
    }
    # Of several stages, those that keep the fewest.
    found = {setting: limit for setting, limit in limits.items() if limit == min(limits.values())}
    for metric in list_coco_metrics(cfg, 'test' if loop == 'test' else 'val'):
        numbers = metric.get('proposal_nums') or (100,)
        found[f'{"test" if loop == "test" else "val"}_evaluator.proposal_nums'] = (
            100 if 100 in numbers else max(numbers)
        )
    return found


def remove_faults(coco: dict, name: str, found: Findings) -> dict:
    """Return a file's content without faulty annotations and faulty images with their annotations."""
    images = [image for i, image in enumerate(coco['images']) if i not in found.faulty_images[name]]
    left = {image['id'] for image in images}
    annotations = [
        annotation
        for i, annotation in enumerate(coco['annotations'])
        if i not in found.faulty_annotations[name] and annotation['image_id'] in left
    ]
    return {**coco, 'images': images, 'annotations': annotations}


def check_categories(ann_file: Path, categories: Sequence[str], classes: Sequence[str]) -> None:
    """Check that an annotation file has the trained classes in the same order, which defines MMDetection's labels.

    Raises:
        InputError: if not.
    """
    if list(categories) == list(classes):
        return
    lacking, besides = ([n for n in a if n not in b] for a, b in ((classes, categories), (categories, classes)))
    faults = [f'missing: {list_briefly(lacking)}'] * bool(lacking)
    faults += [f'additional: {list_briefly(besides)}'] * bool(besides)
    raise InputError(
        f'annotation file {ann_file}: its categories are not the {len(classes)} trained classes '
        f"({' and '.join(faults) or 'their order differs'}). Copy the categories from the training's annotation file"
    )


def check_files(coco: dict, folder: Path) -> None:
    """Check that the images of an annotation file exist and are not empty.

    Raises:
        InputError: if not.
    """
    names = [image['file_name'] for image in coco['images']]
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def size(name: str) -> int | None:
        path = folder / name
        return path.stat().st_size if os.path.isfile(path) else None  # False for an invalid name

    sizes |= {name: size(name) for name in names if name not in sizes}
    for kind, faulty in (
        ('lacks', [name for name in names if sizes[name] is None]),
        ('has empty files for', [name for name in names if sizes[name] == 0]),
    ):
        if faulty:
            raise InputError(
                f'image folder {folder}: {kind} {len(faulty)} of the {len(names)} images, first {faulty[0]}. Copy them '
                'there'
            )


def check_dataset(
    dataset: dict,
    loop: str,
    annotated: bool = True,
    classes: Sequence[str] | None = None,
    masks: bool = False,
    thorough: bool = True,
    limits: Mapping[str, int] = LIMITS,
) -> list[str] | None:
    """Check that the annotations, images and classes of a data set in COCO's format exist, agree, and are valid.

    Args:
        dataset: the data set's config.
        loop: 'train', 'val' or 'test'.
        annotated: whether annotations are needed.
        classes: the required categories, if known.
        masks: whether masks are needed.
        thorough: whether to check each annotation and decode images.
        limits: see :func:`find_limits`.

    Returns:
        The classes in the file's order: all categories, or those that the config lists; None for remote data.

    Raises:
        InputError: if not.
    """
    if not isinstance(dataset['ann_file'], str):
        raise InputError(
            f'ann_file {dataset["ann_file"]} in the config: a CocoDataset has one annotation file. For several, use '
            "dict(type='ConcatDataset', datasets=[dict(type='CocoDataset', ...), ...])"
        )
    root = Path(dataset.get('data_root') or '')
    ann_file, folder = root / dataset['ann_file'], root / dataset['data_prefix']['img']
    if '://' in str(dataset.get('data_root')) + dataset['ann_file']:
        return None  # a remote store, which only MMEngine's file client can read
    if not folder.is_dir():
        raise InputError(f'image folder {folder}: no such folder. Correct data_root or data_prefix in the config')
    found = Findings()
    coco = share_coco(ann_file, annotated, found)
    found.require_none(ADVICE)
    if not coco['images']:
        raise InputError(f'annotation file {ann_file}: contains no images. Use another file')
    if masks and annotated and not any(annotation.get('segmentation') for annotation in coco['annotations']):
        raise InputError(
            f'annotation file {ann_file}: its objects have boxes but no masks ("segmentation"), which this detector '
            'needs. Train a detector of boxes: spec-mmdet train xcit_fasterrcnn'
        )

    categories = [category['name'] for category in coco['categories']]
    named = list_stated_classes(dataset)
    if named:  # the config uses some of the file's classes
        categories = [name for name in categories if name in named]
    check_categories(ann_file, categories, classes or named or categories)

    if thorough and annotated:
        check_annotations(coco, ann_file.name, found, masks, categories)
        found.require_none(ADVICE)
    check_files(coco, folder)
    if thorough:
        if annotated:
            filter_cfg = dict(dataset.get('filter_cfg') or {})
            check_contents(coco, ann_file.name, found, loop == 'train', categories, filter_cfg, limits)
            found.require_none(ADVICE)
        check_some_images(coco, ann_file.name, folder, found)
        print_findings(coco, ann_file.name, loop, found)
    if not is_kind_of(dataset, DATASETS, CheckedCocoDataset):  # other types read the file again
        forget_coco(ann_file)
    return categories


def check_some_images(coco: dict, name: str, folder: Path, found: Findings) -> None:
    """Decode at most :data:`LOOKED_AT` evenly spaced images of a data set; the loader checks each image again."""
    entries = list(enumerate(coco['images']))
    step = -(-len(entries) // LOOKED_AT)
    check_images(entries[::step], folder, name, found)
    found.require_none(ADVICE)
    if step > 1:
        note = 'images decoded before the start; "spec-mmdet prepare" decodes all'
        found.notes[note] += [Place(str(folder), image['file_name']) for _, image in entries[::step]]


def print_findings(coco: dict, name: str, loop: str, found: Findings) -> None:
    print(f'{loop}: {len(coco["images"])} images, {len(coco.get("annotations", ()))} annotations in {name}')
    found.print()


def check_inputs(
    cfg: Config, loops: Sequence[str], classes: Sequence[str] | None = None, thorough: bool = True
) -> Sequence[str] | None:
    """Check the data that a run will read, each data set once.

    Args:
        cfg: the complete config, with command line options merged.
        loops: the loops to check, of 'train', 'val' and 'test'.
        classes: the required classes; by default those of the first annotation file.
        thorough: whether to check each annotation and decode images.

    Returns:
        The classes; None if all data is remote.

    Raises:
        InputError: naming the first fault.
    """
    checked = []
    for loop in loops:
        for evaluator in list_evaluators(cfg, loop):
            ann_file = evaluator.get('ann_file')
            if ann_file and '://' not in ann_file and not Path(ann_file).is_file():
                raise InputError(f'annotation file {ann_file}: no such file ({loop}_evaluator.ann_file in the config)')
        annotated = not any(evaluator.get('format_only') for evaluator in list_evaluators(cfg, loop))
        for dataset in list_coco_datasets(cfg.get(f'{loop}_dataloader')):
            source = {key: dataset.get(key) for key in ('data_root', 'ann_file', 'data_prefix')}
            if source not in checked:
                masks = has_masks(cfg.get('model'))
                limits = find_limits(cfg, loop)
                classes = check_dataset(dataset, loop, annotated, classes, masks, thorough, limits) or classes
                checked.append(source)
    return classes
