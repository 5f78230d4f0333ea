"""Detection and instance segmentation on COCO's annotation files: a task (see :mod:`tasks`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ..errors import InputError, list_briefly
from .checks import check_inputs
from .fitting import (
    drop_stuff_branch,
    has_masks,
    is_coco_dataset,
    list_coco_metrics,
    list_kinds,
    require_class_weights,
    require_monitored_metrics,
    require_one_annotation_file,
    set_classes,
    state_classes_once,
    use_masks_as_the_model,
)
from .folders import find_split
from .masks import use_polygons

__all__ = ['adapt', 'find_best_metric', 'reads', 'set_classes', 'use_split']

reads = is_coco_dataset


def use_split(dataset: dict, evaluators: Sequence[dict], folder: Path, split: str) -> None:
    """Point a data set and evaluators at a split, 'train' or 'val', of a folder in COCO's layout; changes them.

    Raises:
        InputError: if the folder lacks the split; see :func:`find_split`.
    """
    found = find_split(folder, split)
    if found is None:
        raise InputError(
            f'--data {folder}: lacks annotations/instances_{split}*.json and the folder {split}* of its images. '
            f'Run "spec-mmdet prepare {folder} --out DIR" to convert other formats'
        )
    ann_file, images = found
    dataset['data_root'] = f'{folder}/'
    dataset['ann_file'] = ann_file.relative_to(folder).as_posix()
    dataset['data_prefix'] = dict(dataset.get('data_prefix') or {}, img=f'{images.relative_to(folder).as_posix()}/')
    for evaluator in evaluators:
        if 'ann_file' in evaluator:
            evaluator['ann_file'] = str(ann_file)


def adapt(
    cfg: Config, loops: Sequence[str], classes: Sequence[str] | None, check: bool, thorough: bool
) -> Sequence[str] | None:
    """Adapt a config to the data that a run reads, after checking it if wanted; changes ``cfg``.

    Args:
        cfg: the complete config.
        loops: loops of the run, of 'train', 'val' and 'test'; the first one's data set defines the classes.
        classes: the required classes; by default those of the first annotation file.
        check: whether to check the data, and to print what was found and changed.
        thorough: whether to check each annotation and image.

    Returns:
        The classes; None if all data is remote.
    """
    stated = state_classes_once(cfg)
    masks_changed = use_masks_as_the_model(cfg)
    bitmaps = use_polygons(cfg)
    if 'train' in loops and drop_stuff_branch(cfg) and check:
        print('no stuff maps (train_dataloader.dataset.data_prefix.seg): the detector is trained without them')
    if check:
        require_one_annotation_file(cfg, loops)
        if 'train' in loops:
            require_monitored_metrics(cfg)
        if bitmaps:
            print(f'masks are loaded as bitmaps, which need memory for large images: {", ".join(bitmaps)}')
        if masks_changed and not has_masks(cfg.get('model')):
            print('the detector has no mask head: masks are neither loaded nor evaluated')
        classes = check_inputs(cfg, loops, classes, thorough)
        print(f'{len(classes)} classes: {list_briefly(classes)}' if classes else 'the classes are those of the config')
    if classes:
        set_classes(cfg, classes, "metainfo.classes of the config's data sets" if stated else 'the data')
    if check and 'train' in loops:
        require_class_weights(cfg)
    return classes


def find_best_metric(cfg: Config) -> str | None:
    """Return the metric that chooses the best checkpoint: mask AP, or else box AP; '' for others, None without any."""
    metrics = list_coco_metrics(cfg, 'val')
    kinds = {kind for metric in metrics for kind in list_kinds(metric)}
    for kind in ('segm', 'bbox'):
        if kind in kinds:
            return f'{metrics[0].get("prefix") or "coco"}/{kind}_mAP'
    return '' if metrics else None
