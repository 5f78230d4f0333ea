"""Make a config agree with its data and with itself: one list of classes, and masks if the model predicts them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric, LVISMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import Registry

from ..errors import InputError, list_briefly

LOOPS = ('train', 'val', 'test')
NOT_OF_THE_CLASSES = ('rpn_head', 'semantic_head')  # of proposals, which have no class, and of other classes (stuff)
MASK_HEADS = ('mask_head', 'panoptic_head')
OTHER_FORMATS = (CocoPanopticDataset, LVISV05Dataset)  # derived from CocoDataset, but their files are not COCO's


def find_class(node: dict, registry: Registry) -> type | None:
    """Return the class that the ``type`` of a config's dict names (with or without a scope) or is, if there is one."""
    kind = node.get('type')
    if isinstance(kind, str):
        owner = registry
        while owner is not None and kind not in owner.module_dict:
            owner = owner.parent
        # A name that no registry has is not searched for: MMEngine would import a module of that name.
        kind = owner.module_dict[kind] if owner else registry.get(kind) if kind.startswith('mmdet.') else None
    return kind if inspect.isclass(kind) else None


def is_kind_of(node: dict, registry: Registry, kinds: type | tuple[type, ...]) -> bool:
    """Tell whether the type of a config's dict is one of these classes or derived from one."""
    return issubclass(find_class(node, registry) or object, kinds)


def is_coco_dataset(node: dict) -> bool:
    """Tell whether a config's dict is a data set that reads COCO's annotation files for instances."""
    return is_kind_of(node, DATASETS, CocoDataset) and not is_kind_of(node, DATASETS, OTHER_FORMATS)


def coco_datasets(node: object) -> Iterator[dict]:
    """Every data set in COCO's format in (a part of) a config, also inside wrappers."""
    for _, found in walk(node):
        if is_coco_dataset(found):
            yield found


def coco_metrics(cfg: Config, loop: str) -> list[dict]:
    """The configs of a loop's evaluators that compute COCO's metrics."""
    found = evaluators(cfg, loop)
    return [e for e in found if is_kind_of(e, METRICS, CocoMetric) and not is_kind_of(e, METRICS, LVISMetric)]


def evaluators(cfg: Config, loop: str) -> list[dict]:
    """The configs of a loop's evaluators, of which there may be none, one or several."""
    found = cfg.get(f'{loop}_evaluator') or []
    return found if isinstance(found, list) else [found]


def walk(node: object, name: str = '') -> Iterator[tuple[str, dict]]:
    """Every dict in (a part of) a config with its name, as --cfg-options has it; those outside first."""
    if isinstance(node, dict):
        yield name, node
        for key, child in node.items():
            yield from walk(child, f'{name}.{key}' if name else str(key))
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from walk(child, f'{name}.{i}' if name else str(i))


def classes_in(metainfo: dict | None) -> list[str]:
    """The classes that a data set's metainfo in a config states: a list, one name, or a file with a name a line."""
    classes = (metainfo or {}).get('classes') or []
    if isinstance(classes, str):
        return Path(classes).read_text(encoding='utf-8').splitlines() if Path(classes).is_file() else [classes]
    return list(classes)


def configured_classes(dataset: dict) -> list[str]:
    """The classes that a data set in COCO's format uses: those of its metainfo, or else of its type."""
    return classes_in(dataset.get('metainfo')) or list(find_class(dataset, DATASETS).METAINFO.get('classes') or ())


def stated_classes(dataset: dict) -> list[str]:
    """The classes that a config states for a data set: in its metainfo, or by a type with classes other than COCO's."""
    classes = configured_classes(dataset)
    inherited = not classes_in(dataset.get('metainfo')) and classes == list(CocoDataset.METAINFO['classes'])
    return [] if inherited else classes


def state_classes_once(cfg: Config) -> list[str]:
    """Have all data sets of a config know the classes that the metainfo of one of them states; changes ``cfg``.

    Returns:
        These classes; none where no metainfo states any, and the annotation files tell.

    Raises:
        InputError: if two data sets state different ones, or one states them by a name that nothing reads.
    """
    stated: dict[str, list[str]] = {}
    for loop in LOOPS:
        for name, dataset in walk(cfg.get(f'{loop}_dataloader'), f'{loop}_dataloader'):
            if not is_coco_dataset(dataset):
                continue
            for place, metainfo in (
                (f'{name}.metainfo', dataset.get('metainfo') or {}),
                (f'METAINFO of {name}.type', find_class(dataset, DATASETS).METAINFO),
            ):
                if 'CLASSES' in metainfo:
                    raise InputError(f'{place} contains CLASSES: MMDetection 3 reads "classes" instead; rename it')
            if classes := stated_classes(dataset):
                stated[f'{name}.metainfo.classes'] = classes
    if not stated:
        return []
    (first, classes), *others = stated.items()
    for name, other in others:
        if set(other) != set(classes):
            raise InputError(
                f'{name} is ({list_briefly(other)}) and {first} is ({list_briefly(classes)}) in the config: give both '
                'the same classes'
            )
    for dataset in coco_datasets(cfg._cfg_dict):
        dataset['metainfo'] = dict(dataset.get('metainfo') or {}, classes=tuple(classes))
    return classes


def require_one_annotation_file(cfg: Config, loops: Sequence[str]) -> None:
    """Check that each loop's evaluators read the annotation file of its data set.

    Raises:
        InputError: if one reads another file that is there; its images would not be those that are predicted on.
    """
    for loop in loops:
        datasets = list(coco_datasets(cfg.get(f'{loop}_dataloader')))
        for evaluator in evaluators(cfg, loop) if len(datasets) == 1 else ():
            measured, predicted = evaluator.get('ann_file'), datasets[0].get('ann_file')
            if isinstance(measured, str) and isinstance(predicted, str):
                files = Path(measured), Path(datasets[0].get('data_root') or '', predicted)
                if all(path.is_file() for path in files) and not files[0].samefile(files[1]):
                    raise InputError(
                        f'{loop}_evaluator.ann_file is {files[0]} and {loop}_dataloader.dataset.ann_file is {files[1]} '
                        'in the config: give both the same file'
                    )


def class_heads(model: dict | None) -> Iterator[tuple[str, dict]]:
    """What is as wide as there are classes: all in a model's heads that has num_classes, with its name."""
    for name, node in walk(model or {}, 'model'):
        keys = name.split('.')
        if 'num_classes' in node and any('head' in key for key in keys) and not set(keys) & {*NOT_OF_THE_CLASSES}:
            yield name, node


def set_classes(cfg: Config, classes: Sequence[str], source: str = 'the data') -> None:
    """Have a config's data sets and the heads of its model know these classes, in this order; changes ``cfg``.

    Args:
        cfg: the whole config.
        classes: their names.
        source: where they come from, for an error's message.

    Raises:
        InputError: if a head was given a number of classes by hand: one that is neither theirs, nor COCO's, which
            configs inherit, nor that of the classes which the config's data sets had so far.
    """
    inherited = {len(configured_classes(dataset)) for dataset in coco_datasets(cfg._cfg_dict)}
    inherited |= {len(CocoDataset.METAINFO['classes']), len(classes)}
    for name, head in class_heads(cfg.get('model')):
        if head['num_classes'] not in inherited:
            raise InputError(
                f'{name}.num_classes is {head["num_classes"]} in the config, but {source} has {len(classes)} classes '
                f'({list_briefly(classes)}): leave num_classes out, it is set by the data'
            )
        head['num_classes'] = len(classes)
    metainfo = dict(classes=tuple(classes))
    if len(classes) > 80:
        metainfo['palette'] = None  # COCO's colours end there, and drawing more classes would fail; None makes some up
    for dataset in coco_datasets(cfg._cfg_dict):
        dataset['metainfo'] = {**(dataset.get('metainfo') or {}), **metainfo}


def has_masks(model: dict | None) -> bool:
    """Whether a detector, by its config, finds masks and so learns from them."""
    for _, node in walk(model or {}):
        if any(isinstance(node.get(key), (dict, list)) and node[key] for key in MASK_HEADS):
            return True
        if str(node.get('type', '')).startswith('RTMDetIns'):  # whose head of boxes finds masks, too
            return True
    return False


def use_masks_as_the_model(cfg: Config) -> bool:
    """Have a config load masks to learn from if its model finds them, and else nowhere; changes ``cfg``.

    A model without them is measured by its boxes, and so is its best checkpoint chosen.

    Returns:
        Whether anything was changed.
    """
    before = cfg.to_dict()
    masks = has_masks(cfg.get('model'))
    for loop in LOOPS:
        for _, transform in walk(cfg.get(f'{loop}_dataloader')):
            if is_kind_of(transform, TRANSFORMS, LoadAnnotations) and (loop == 'train' or not masks):
                transform['with_mask'] = masks
        for evaluator in evaluators(cfg, loop):
            metrics = evaluator.get('metric')
            if metrics and not masks:
                metrics = [metrics] if isinstance(metrics, str) else metrics
                evaluator['metric'] = [metric for metric in metrics if metric != 'segm'] or ['bbox']
    if not masks:
        for hook in [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]:
            for key in ('save_best', 'monitor'):  # of checkpoints, of early stopping
                if isinstance((hook or {}).get(key), str):
                    hook[key] = hook[key].replace('segm_', 'bbox_')
    return cfg.to_dict() != before
