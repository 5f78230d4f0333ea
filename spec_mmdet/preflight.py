"""Checks of a config's inputs before any work starts."""

from __future__ import annotations

import json
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config

from .data import coco_datasets
from .errors import InputError


def read_coco(path: Path, annotated: bool = True) -> dict:
    """Read an annotation file in COCO's format for instances.

    Args:
        path: a JSON file.
        annotated: whether annotations are needed; COCO's own test images come without.

    Returns:
        Its content: a dict with at least 'images' and 'categories' and, if needed, 'annotations'.

    Raises:
        InputError: if it does not exist or is not COCO JSON.
    """
    if not path.is_file():
        raise InputError(f'annotation file {path}: no such file')
    try:
        coco = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f'annotation file {path}: not JSON ({error})') from error
    required = dict(
        images={'id', 'file_name', 'height', 'width'},
        annotations={'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd'},
        categories={'id', 'name'},
    )
    if not annotated:
        del required['annotations']
    for key, fields in required.items():
        entries = coco.get(key) if isinstance(coco, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f'annotation file {path}: not in COCO\'s format, it has no list of "{key}"')
        for entry in entries:
            if not fields <= entry.keys():
                lacking = ', '.join(sorted(fields - entry.keys()))
                raise InputError(f'annotation file {path}: not in COCO\'s format, one of its "{key}" has no {lacking}')
    return coco


def classes_of(dataset: dict) -> list[str]:
    """The names of the classes that a CocoDataset's config, or else its type, has."""
    classes = (dataset.get('metainfo') or {}).get('classes') or DATASETS.get(dataset['type']).METAINFO['classes']
    return [classes] if isinstance(classes, str) else list(classes)


def check_dataset(dataset: dict, annotated: bool = True) -> None:
    """Check that a CocoDataset's annotations, images and classes are there and agree.

    Args:
        dataset: its config.
        annotated: whether annotations are needed.

    Raises:
        InputError: if not.
    """
    root = Path(dataset.get('data_root') or '')
    ann_file, folder = root / dataset['ann_file'], root / dataset['data_prefix']['img']
    if '://' in str(dataset.get('data_root')) + dataset['ann_file']:
        return  # a remote store, which only mmengine's file client can read
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

    classes = classes_of(dataset)
    categories = [category['name'] for category in coco['categories']]
    # MMDetection numbers the labels in the file's order and leaves out what the file lacks, without a word.
    if [name for name in categories if name in classes] != classes:
        raise InputError(
            f'annotation file {ann_file}: its categories ({_some(categories)}) do not contain the classes of the '
            f'config ({_some(classes)}) in the same order. Set metainfo=dict(classes=(...)) of the datasets, and '
            'num_classes of the heads, to what the file holds.'
        )


def _some(names: list[str]) -> str:
    return ', '.join(names[:5]) + (f', ... {len(names)} in all' if len(names) > 5 else '')


def check_inputs(cfg: Config, loops: tuple[str, ...]) -> None:
    """Check the data that a run will read, each file once.

    Args:
        cfg: the whole config, command line options merged.
        loops: which parts the run uses, of 'train', 'val' and 'test'.

    Raises:
        InputError: on the first thing that is missing or does not fit.
    """
    checked = []
    for loop in loops:
        evaluators = cfg.get(f'{loop}_evaluator') or []
        evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
        for evaluator in evaluators:
            ann_file = evaluator.get('ann_file')
            if ann_file and '://' not in ann_file and not Path(ann_file).is_file():
                raise InputError(f'annotation file {ann_file}: no such file ({loop}_evaluator.ann_file in the config)')
        annotated = not any(evaluator.get('format_only') for evaluator in evaluators)
        for dataset in coco_datasets(cfg.get(f'{loop}_dataloader')):
            source = {key: dataset.get(key) for key in ('data_root', 'ann_file', 'data_prefix', 'metainfo')}
            if source not in checked:
                check_dataset(dataset, annotated)
                checked.append(source)
