"""Fitting a config to a data set: its classes come from the annotation file, not from the config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmengine.config import Config


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


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Have a config's data sets and the heads of its model know these classes, in this order; changes ``cfg``."""

    def set_heads(node: object) -> None:
        if isinstance(node, dict):
            if 'num_classes' in node:
                node['num_classes'] = len(classes)
            for child in node.values():
                set_heads(child)
        elif isinstance(node, (list, tuple)):
            for child in node:
                set_heads(child)

    set_heads(cfg.get('model'))
    for dataset in coco_datasets(cfg._cfg_dict):
        dataset['metainfo'] = dict(dataset.get('metainfo') or {}, classes=tuple(classes))
