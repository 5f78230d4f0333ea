"""Find the evaluation of a config's task: the module here that has the name of the task's module in data/."""

from __future__ import annotations

from types import ModuleType

from mmengine.config import Config

from ..data import tasks
from . import detection, panoptic, semantic

TASKS: dict[str, ModuleType] = {'detection': detection, 'panoptic': panoptic, 'semantic': semantic}
# Labels of the metrics that are plotted, by their names in MMEngine's log.
LABELS: dict[str, str] = {name: label for task in TASKS.values() for name, label in task.LABELS.items()}
PREFIXES = tuple({f'{name.partition("/")[0]}/' for name in LABELS})  # of these metrics, and of their variants


def find_task(cfg: Config) -> ModuleType:
    """Return the module of this folder for the task of a config."""
    return TASKS[tasks.find_task(cfg).__name__.rpartition('.')[2]]
