"""Find a data set's annotation file and images in a folder, and point a config at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config

from ..errors import InputError
from .fitting import list_coco_datasets, list_evaluators

ROBOFLOW = '_annotations.coco.json'


def list_pairs(folder: Path, split: str) -> Iterator[tuple[Path, list[Path]]]:
    """Yield the annotation files of a split with the possible folders of its images.

    These are COCO's, CVAT's and Roboflow's: annotations/instances_train2017.json with train2017/, instances_Train.json
    with images/Train/, and train/_annotations.coco.json next to its images.
    """
    for ann_file in sorted(folder.glob('annotations/instances_*.json')):
        name = ann_file.stem.removeprefix('instances_')
        if name.lower().startswith(split):
            yield ann_file, [folder / name, folder / 'images' / name]
    for name in (split, 'valid') if split == 'val' else (split,):
        if (folder / name / ROBOFLOW).is_file():
            yield folder / name / ROBOFLOW, [folder / name]


def find_split(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Find the annotation file and the image folder of a split.

    Args:
        folder: a folder in COCO's, CVAT's or Roboflow's layout, see :func:`list_pairs`.
        split: 'train', 'val' or 'test'; folders may be called train, train2017 or valid.

    Returns:
        Both paths, or None if both are missing.

    Raises:
        InputError: if one of them is missing, or there are several pairs.
    """
    pairs = list(list_pairs(folder, split))
    found = [
        (ann_file, next(filter(Path.is_dir, images))) for ann_file, images in pairs if any(map(Path.is_dir, images))
    ]
    if len(found) > 1:
        names = ', '.join(str(images.relative_to(folder)) for _, images in found)
        raise InputError(f'{folder}: contains several data sets for {split} ({names}). Keep one of them')
    if found:
        return found[0]
    if pairs:
        ann_file, images = pairs[0]
        raise InputError(f'{folder}: the images of annotations/{ann_file.name} are missing. Copy them to {images[0]}')
    for images in sorted(folder.glob(f'{split}*')):
        if images.is_dir():
            ann_file = folder / 'annotations' / f'instances_{images.name}.json'
            raise InputError(f'{folder}: {images.name} lacks its annotation file. Copy it to {ann_file}')
    return None


def use_folder(cfg: Config, folder: Path, loops: Sequence[str]) -> None:
    """Point a config's data sets and evaluators at a folder in COCO's layout; changes ``cfg``.

    Args:
        cfg: the complete config.
        folder: see :func:`find_split`.
        loops: loops to change, of 'train', 'val' and 'test'. The test loop uses the validation images.

    Raises:
        InputError: if the folder lacks a split, or a loop does not have exactly one CocoDataset.
    """
    if not folder.is_dir():
        raise InputError(f'--data {folder}: no such folder. Check the path')
    folder = folder.absolute()  # the saved config must work in any working directory
    for loop in loops:
        loader = cfg.get(f'{loop}_dataloader')
        if loader is None:
            continue
        datasets = list(list_coco_datasets(loader))
        if len(datasets) != 1:
            raise InputError(
                f'--data: {loop}_dataloader in the config has {len(datasets)} data sets of type CocoDataset instead of '
                'one. Leave out --data, and set the paths in the config'
            )
        split = 'train' if loop == 'train' else 'val'
        found = find_split(folder, split)
        if found is None:
            raise InputError(
                f'--data {folder}: lacks annotations/instances_{split}*.json and the folder {split}* of its images. '
                f'Run "spec-mmdet prepare {folder} --out DIR" to convert other formats'
            )
        ann_file, images = found
        dataset = datasets[0]
        dataset['data_root'] = f'{folder}/'
        dataset['ann_file'] = ann_file.relative_to(folder).as_posix()
        dataset['data_prefix'] = dict(dataset.get('data_prefix') or {}, img=f'{images.relative_to(folder).as_posix()}/')
        for evaluator in list_evaluators(cfg, loop):
            if 'ann_file' in evaluator:
                evaluator['ann_file'] = str(ann_file)
