"""Data sets' folders: where an annotation file and its images are, and pointing a config at them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ..errors import InputError
from .fitting import coco_datasets, evaluators


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
