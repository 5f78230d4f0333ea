"""Check data sets, in ``spec-mmdet prepare``, and before a run in train and test.

The rules are in :mod:`rules`; the results go to :class:`Findings`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mmdet.registry import DATASETS
from mmengine.config import Config

from ..errors import InputError, list_briefly
from . import rules
from .findings import Findings, Place
from .fitting import coco_datasets, evaluators, has_masks, is_kind_of, stated_classes
from .images import check_images
from .reading import CheckedCocoDataset, forget_coco, share_coco

FILTER = MappingProxyType(dict(filter_empty_gt=True, min_size=32))  # what COCO's configs leave out of training
LOOKED_AT = 500  # images that train and test decode before they start
ADVICE = 'spec-mmdet prepare lists all that is wrong, and with --drop writes what is not; --no-check goes on regardless'


def check_annotations(
    coco: dict, name: str, found: Findings, masks: bool | None = None, classes: Sequence[str] | None = None
) -> None:
    """Check the entries of an annotation file, without its images.

    Args:
        coco: its content, from :func:`read_coco`.
        name: what to call it.
        found: what is wrong is added here.
        masks: whether they are needed; None where that is not known, and a file without any is in order.
        classes: those that are taken; objects of others are not looked at. By default all.
    """
    check_ids(coco, name, found)
    for position, image in enumerate(coco['images']):
        path = Path(image['file_name'])
        fault = rules.find_size_fault(image['width'], image['height'])
        if path.is_absolute() or '..' in path.parts:
            fault = 'file names that lead out of the image folder'
        if fault:
            found.errors[fault].append(Place(name, image['file_name']))
            found.faulty_images[name].add(position)

    if masks is None and not any(annotation.get('segmentation') for annotation in coco['annotations']):
        masks = False
        found.notes['files without masks, for detectors that find boxes alone'].append(Place(name))
    images = {image['id']: image for image in coco['images']}
    categories = {category['id']: category['name'] for category in coco['categories']}
    for position, annotation in enumerate(coco['annotations']):
        image, category = images.get(annotation['image_id']), categories.get(annotation['category_id'])
        place = Place(name, '' if image is None else image['file_name'], annotation['id'])
        if image is None:
            fault, doubt = 'annotations of an image_id that no image has', ''
        elif category is None:
            fault, doubt = 'annotations of a category_id that no category has', ''
        elif classes is not None and category not in classes:
            continue
        else:
            fault, doubt = check_object(annotation, image, masks is not False)
        if fault:
            found.errors[fault].append(place)
            found.faulty_annotations[name].add(position)
        if doubt:
            found.warnings[doubt].append(place)


def check_ids(coco: dict, name: str, found: Findings) -> None:
    """Check that images and annotations have different ids; of several with one id, the first is valid."""
    for key, faulty in (('images', found.faulty_images), ('annotations', found.faulty_annotations)):
        seen = set()
        for position, entry in enumerate(coco[key]):
            if entry['id'] in seen:
                found.errors[f'ids that several {key} have'].append(Place(name, detail=f'id {entry["id"]}'))
                faulty[name].add(position)
            seen.add(entry['id'])


def check_object(annotation: dict, image: dict, with_mask: bool) -> tuple[str, str]:
    """Return the error and the warning of an object, each '' where there is none."""
    size = image['width'], image['height']
    if rules.find_size_fault(*size):
        return '', ''  # an error of the image's
    box, mask = annotation['bbox'], annotation.get('segmentation')
    fault = rules.find_box_fault(box, *size) or rules.find_area_fault(annotation['area'], box)
    fault = fault or rules.find_crowd_fault(annotation['iscrowd'])
    if not fault and with_mask:
        missing = 'objects without a mask ("segmentation"), which Mask R-CNN learns from'
        fault = rules.find_mask_fault(mask, *size) if mask else missing
    if fault:
        return fault, ''
    doubt = rules.explain_exclusion(annotation)
    if with_mask and min(box[2:]) >= 1:
        fault, of_mask = rules.compare_mask_and_box(mask, box, *size)
        doubt = doubt or of_mask
    return fault, doubt


def check_contents(
    coco: dict,
    name: str,
    found: Findings,
    training: bool,
    classes: Sequence[str] | None = None,
    filter_cfg: Mapping = FILTER,
) -> None:
    """Check that a split has objects for training, or for evaluation, in each of its classes and images.

    Args:
        coco: its content, without errors.
        name: what to call it.
        found: what is wrong is added here.
        training: whether it is learnt from; otherwise it is measured by.
        classes: those that are taken; by default all.
        filter_cfg: which images training leaves out, as CocoDataset has it; by default as COCO's configs have it.
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
        what = 'learn from' if training else 'measure by'
        found.errors[f'splits without an object to {what}'].append(
            Place(name, detail=f'none of {len(taken)} annotations')
        )

    categories, images = ({annotation[key] for annotation in used} for key in ('category_id', 'image_id'))
    for category in coco['categories']:
        if category['id'] not in categories and (classes is None or category['name'] in classes):
            found.warnings['classes without an object'].append(Place(name, detail=category['name']))
    for image in coco['images']:
        if image['id'] not in images and image['id'] not in left_out:
            found.warnings['images without an object'].append(Place(name, image['file_name']))


def remove_faults(coco: dict, name: str, found: Findings) -> dict:
    """Return a file's content without images that have an error, their annotations, and annotations that have one."""
    images = [image for i, image in enumerate(coco['images']) if i not in found.faulty_images[name]]
    left = {image['id'] for image in images}
    annotations = [
        annotation
        for i, annotation in enumerate(coco['annotations'])
        if i not in found.faulty_annotations[name] and annotation['image_id'] in left
    ]
    return {**coco, 'images': images, 'annotations': annotations}


def check_categories(ann_file: Path, categories: Sequence[str], classes: Sequence[str]) -> None:
    """Check that an annotation file has the trained classes in their order, which MMDetection's labels depend on.

    Raises:
        InputError: if not.
    """
    if list(categories) == list(classes):
        return
    lacking, besides = ([n for n in a if n not in b] for a, b in ((classes, categories), (categories, classes)))
    faults = [f'it lacks {list_briefly(lacking)}'] * bool(lacking) + [f'it has {list_briefly(besides)} besides'] * bool(
        besides
    )
    raise InputError(
        f'annotation file {ann_file}: its categories are not the {len(classes)} classes trained for '
        f"({' and '.join(faults) or 'they are in another order'}). Give it the list of categories of the training's "
        'annotation file.'
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
        return path.stat().st_size if os.path.isfile(path) else None  # False for a name that no file can have

    sizes |= {name: size(name) for name in names if name not in sizes}
    for kind, faulty in (
        ('lacks', [name for name in names if sizes[name] is None]),
        ('holds no byte of', [name for name in names if sizes[name] == 0]),
    ):
        if faulty:
            raise InputError(
                f'image folder {folder}: {kind} {len(faulty)} of the {len(names)} images, first {faulty[0]}'
            )


def check_dataset(
    dataset: dict,
    loop: str,
    annotated: bool = True,
    classes: Sequence[str] | None = None,
    masks: bool = False,
    thorough: bool = True,
) -> list[str] | None:
    """Check that the annotations, images and classes of a data set in COCO's format exist, agree, and are valid.

    Args:
        dataset: its config.
        loop: what it is for, 'train', 'val' or 'test'.
        annotated: whether annotations are needed.
        classes: what its categories must be, if that is known.
        masks: whether masks are needed.
        thorough: whether to look at the annotations one by one, and at images.

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
    found = Findings()
    coco = share_coco(ann_file, annotated, found)
    found.require_none(ADVICE)
    if not coco['images']:
        raise InputError(f'annotation file {ann_file}: lists no images')
    if masks and annotated and not any(annotation.get('segmentation') for annotation in coco['annotations']):
        raise InputError(
            f'annotation file {ann_file}: its objects have boxes alone, no masks ("segmentation"), which this detector '
            'learns from. Take one that finds boxes: spec-mmdet train xcit_spec_fasterrcnn'
        )

    categories = [category['name'] for category in coco['categories']]
    named = stated_classes(dataset)
    if named:  # by a config that takes some of the file's classes
        categories = [name for name in categories if name in named]
    check_categories(ann_file, categories, classes or named or categories)

    if thorough and annotated:
        check_annotations(coco, ann_file.name, found, masks, categories)
        found.require_none(ADVICE)
    check_files(coco, folder)
    if thorough:
        if annotated:
            check_contents(
                coco, ann_file.name, found, loop == 'train', categories, dict(dataset.get('filter_cfg') or {})
            )
            found.require_none(ADVICE)
        check_some_images(coco, ann_file.name, folder, found)
        print_findings(coco, ann_file.name, loop, found)
    if not is_kind_of(dataset, DATASETS, CheckedCocoDataset):  # it reads the file itself
        forget_coco(ann_file)
    return categories


def check_some_images(coco: dict, name: str, folder: Path, found: Findings) -> None:
    """Decode the images of a data set, at most :data:`LOOKED_AT`, evenly spaced; the loader checks each one again."""
    entries = list(enumerate(coco['images']))
    step = -(-len(entries) // LOOKED_AT)
    check_images(entries[::step], folder, name, found)
    found.require_none(ADVICE)
    if step > 1:
        note = 'images decoded before the start; spec-mmdet prepare decodes all'
        found.notes[note] += [Place(str(folder), image['file_name']) for _, image in entries[::step]]


def print_findings(coco: dict, name: str, loop: str, found: Findings) -> None:
    print(f'{loop}: {len(coco["images"])} images, {len(coco.get("annotations", ()))} annotations in {name}')
    found.print()


def check_inputs(
    cfg: Config, loops: Sequence[str], classes: Sequence[str] | None = None, thorough: bool = True
) -> Sequence[str] | None:
    """Check the data that a run will read, each data set once.

    Args:
        cfg: the whole config, command line options merged.
        loops: which parts the run uses, of 'train', 'val' and 'test'.
        classes: what all annotation files must hold; by default what the first of them holds.
        thorough: whether to look at the annotations one by one, and at images.

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
                masks = has_masks(cfg.get('model'))
                classes = check_dataset(dataset, loop, annotated, classes, masks, thorough) or classes
                checked.append(source)
    return classes
