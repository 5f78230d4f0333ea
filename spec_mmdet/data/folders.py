"""Fitting a config to a data set in COCO's layout: the folder is named, the classes come from the annotation file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdet.registry import DATASETS
from mmengine.config import Config

from ..errors import InputError


def find_split(folder: Path, split: str) -> tuple[Path, Path] | None:
    """The annotation file and the image folder of a split, as COCO lays them out.

    Args:
        folder: holds annotations/instances_{split}*.json beside an image folder of the same name as in {split}*.
        split: 'train' or 'val'; their folders may be called train or train2017.

    Returns:
        Both paths, or None where there is neither of them.

    Raises:
        InputError: if one is there without the other, or several pairs are.
    """
    ann_files = sorted(folder.glob(f'annotations/instances_{split}*.json'))
    pairs = [(ann_file, folder / ann_file.stem.removeprefix('instances_')) for ann_file in ann_files]
    found = [pair for pair in pairs if pair[1].is_dir()]
    if len(found) > 1:
        names = ', '.join(images.name for _, images in found)
        raise InputError(f'{folder}: holds several data sets for {split} ({names}); leave one of them there')
    if found:
        return found[0]
    if pairs:
        raise InputError(f'{folder}: annotations/{ann_files[0].name} lacks its images, which belong in {pairs[0][1]}')
    for images in sorted(folder.glob(f'{split}*')):
        if images.is_dir():
            ann_file = folder / 'annotations' / f'instances_{images.name}.json'
            raise InputError(f'{folder}: the images in {images.name} lack their annotation file, {ann_file}')
    return None


def use_folder(cfg: Config, folder: Path, loops: Sequence[str]) -> None:
    """Point a config's data sets and evaluators at a folder in COCO's layout; changes ``cfg``.

    Args:
        cfg: the whole config.
        folder: see :func:`find_split`.
        loops: which parts, of 'train', 'val' and 'test'. The test loop uses the validation images.

    Raises:
        InputError: if the folder lacks a split or the config's loops do not have one CocoDataset each.
    """
    if not folder.is_dir():
        raise InputError(f'--data {folder}: no such folder')
    folder = folder.absolute()  # what the run's config says holds from everywhere
    for loop in loops:
        loader = cfg.get(f'{loop}_dataloader')
        if loader is None:
            continue
        datasets = list(coco_datasets(loader))
        if len(datasets) != 1:
            raise InputError(
                f'--data: {loop}_dataloader in the config has {len(datasets)} data sets of type CocoDataset, not one'
            )
        split = 'train' if loop == 'train' else 'val'
        found = find_split(folder, split)
        if found is None:
            raise InputError(
                f'--data {folder}: lacks annotations/instances_{split}*.json and the folder {split}* of its images'
            )
        ann_file, images = found
        dataset = datasets[0]
        dataset['data_root'] = f'{folder}/'
        dataset['ann_file'] = f'annotations/{ann_file.name}'
        dataset['data_prefix'] = dict(dataset.get('data_prefix') or {}, img=f'{images.name}/')
        for evaluator in evaluators(cfg, loop):
            if 'ann_file' in evaluator:
                evaluator['ann_file'] = str(ann_file)


def coco_datasets(node: object) -> Iterator[dict]:
    """Every CocoDataset in (a part of) a config, also inside wrappers."""
    if isinstance(node, dict):
        if node.get('type') == 'CocoDataset':
            yield node
        for child in node.values():
            yield from coco_datasets(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from coco_datasets(child)


def configured_classes(dataset: dict) -> list[str]:
    """The names of the classes that a CocoDataset's config, or else its type, has."""
    classes = (dataset.get('metainfo') or {}).get('classes') or DATASETS.get(dataset['type']).METAINFO['classes']
    return [classes] if isinstance(classes, str) else list(classes)


def evaluators(cfg: Config, loop: str) -> list[dict]:
    """The configs of a loop's evaluators, of which there may be none, one or several."""
    found = cfg.get(f'{loop}_evaluator') or []
    return found if isinstance(found, list) else [found]


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Have a config's data sets and the heads of its model know these classes, in this order; changes ``cfg``.

    Heads are those whose ``num_classes`` is the number of classes that the config's data sets had so far: others, of
    proposals without a class, keep theirs.
    """
    before = {len(configured_classes(dataset)) for dataset in coco_datasets(cfg._cfg_dict)}

    def set_heads(node: object) -> None:
        if isinstance(node, dict):
            if node.get('num_classes') in before:
                node['num_classes'] = len(classes)
            for child in node.values():
                set_heads(child)
        elif isinstance(node, (list, tuple)):
            for child in node:
                set_heads(child)

    set_heads(cfg.get('model'))
    metainfo = dict(classes=tuple(classes))
    if len(classes) > 80:
        metainfo['palette'] = None  # COCO's colours end there, and drawing more classes would fail; None makes some up
    for dataset in coco_datasets(cfg._cfg_dict):
        dataset['metainfo'] = {**(dataset.get('metainfo') or {}), **metainfo}
