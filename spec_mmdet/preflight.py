"""Checks of a config's inputs before any work starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from .data import coco_datasets, evaluators
from .errors import InputError, some


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
            for field, kind in fields.items():
                if not isinstance(entry.get(field), kind):
                    fault = f'the {field} {entry[field]!r:.40}' if field in entry else f'no {field}'
                    raise InputError(f'annotation file {path}: not in COCO\'s format, one of its "{key}" has {fault}')
    for field in ('id', 'name'):
        values = [category[field] for category in coco['categories']]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise InputError(f'annotation file {path}: several of its categories have the {field} {twice}')
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


def check_dataset(dataset: dict, annotated: bool = True, classes: Sequence[str] | None = None) -> list[str] | None:
    """Check that a CocoDataset's annotations, images and classes are there and agree.

    Args:
        dataset: its config.
        annotated: whether annotations are needed.
        classes: what its categories must be, if that is known.

    Returns:
        Its classes in the file's order: all of its categories, or those that the config names;
        None for a data set that is not on this machine.

    Raises:
        InputError: if not.
    """
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
                classes = check_dataset(dataset, annotated, classes) or classes
                checked.append(source)
    return classes
