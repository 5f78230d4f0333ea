"""Find the task of a config, a module of this folder with one of the same name in evaluation/, and ask it.

docs/contributing/architecture.md lists the functions of a task's modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from mmengine.config import Config

from ..configs import walk
from ..errors import InputError
from . import detection, panoptic, semantic
from .fitting import LOOPS, list_configured_classes, list_evaluators

TASKS: tuple[ModuleType, ...] = (panoptic, semantic, detection)


def find_task(cfg: Config) -> ModuleType:
    """Return the module of the task whose data sets a config has; detection if it has none of a known type."""
    nodes = [node for loop in LOOPS for _, node in walk(cfg.get(f'{loop}_dataloader'))]
    return next((task for task in TASKS if any(map(task.reads, nodes))), detection)


def list_datasets(cfg: Config, loop: str) -> Iterator[dict]:
    """Yield the configs of a loop's data sets of the config's task, including those in wrappers."""
    task = find_task(cfg)
    return (node for _, node in walk(cfg.get(f'{loop}_dataloader')) if task.reads(node))


def list_annotation_files(cfg: Config, loop: str) -> list[Path]:
    """List the local annotation files of a loop's data sets."""
    paths = [Path(d.get('data_root') or '', str(d.get('ann_file', ''))) for d in list_datasets(cfg, loop)]
    return [path for path in paths if path.is_file()]


def list_classes(cfg: Config, loop: str) -> list[str]:
    """List the classes of all of a loop's data sets."""
    return [name for dataset in list_datasets(cfg, loop) for name in list_configured_classes(dataset)]


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the classes, in this order, of a config's data sets and of its model; changes ``cfg``."""
    find_task(cfg).set_classes(cfg, classes)


def use_folder(cfg: Config, folder: Path, loops: Sequence[str]) -> None:
    """Point a config's data sets and evaluators at a folder in the layout of its task; changes ``cfg``.

    Args:
        cfg: the complete config.
        folder: see the task's ``use_split``.
        loops: loops to change, of 'train', 'val' and 'test'. The test loop uses the validation images.

    Raises:
        InputError: if the folder lacks a split, or a loop does not have exactly one data set.
    """
    if not folder.is_dir():
        raise InputError(f'--data {folder}: no such folder. Check the path')
    folder = folder.absolute()  # the saved config must work in any working directory
    task = find_task(cfg)
    for loop in loops:
        if cfg.get(f'{loop}_dataloader') is None:
            continue
        datasets = list(list_datasets(cfg, loop))
        if len(datasets) != 1:
            raise InputError(
                f'--data: {loop}_dataloader in the config has {len(datasets)} data sets of a known type, for instance '
                'CocoDataset, instead of one. Leave out --data, and set the paths in the config'
            )
        task.use_split(datasets[0], list_evaluators(cfg, loop), folder, 'train' if loop == 'train' else 'val')


def find_preparing_task(folder: Path, with_boxes: bool = False) -> ModuleType | None:
    """Return the module of the task, other than detection, that prepares a folder; None if there is none.

    Args:
        folder: folder of the data set.
        with_boxes: whether to find the task of label PNGs beside annotations of detection, or of those alone.
    """
    return next((task for task in TASKS if task is not detection and task.can_prepare(folder, with_boxes)), None)
