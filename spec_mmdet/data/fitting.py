"""Fit a config to its data: one list of classes everywhere, and masks if the model predicts them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from mmdet.datasets import CocoDataset, CocoPanopticDataset, LVISV05Dataset
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric, LVISMetric
from mmdet.registry import DATASETS, METRICS, MODELS, TRANSFORMS
from mmengine.config import Config

from ..configs import find_class, is_kind_of, walk
from ..errors import InputError, list_briefly

LOOPS = ('train', 'val', 'test')
NOT_OF_THE_CLASSES = ('rpn_head', 'semantic_head')  # predict proposals without class, and stuff classes
MASK_HEADS = ('mask_head', 'panoptic_head')
OTHER_FORMATS = (CocoPanopticDataset, LVISV05Dataset)  # subclasses of CocoDataset with a different file format


def is_coco_dataset(node: dict) -> bool:
    """Return whether a config's dict is a data set that reads COCO's annotation files for instances."""
    return is_kind_of(node, DATASETS, CocoDataset) and not is_kind_of(node, DATASETS, OTHER_FORMATS)


def list_coco_datasets(node: object) -> Iterator[dict]:
    """Yield the data sets in COCO's format in (a part of) a config, including those in wrappers."""
    for _, found in walk(node):
        if is_coco_dataset(found):
            yield found


def list_coco_metrics(cfg: Config, loop: str) -> list[dict]:
    """List the configs of a loop's evaluators for COCO metrics."""
    found = list_evaluators(cfg, loop)
    return [e for e in found if is_kind_of(e, METRICS, CocoMetric) and not is_kind_of(e, METRICS, LVISMetric)]


def list_evaluators(cfg: Config, loop: str) -> list[dict]:
    """List the configs of a loop's evaluators."""
    found = cfg.get(f'{loop}_evaluator') or []
    return found if isinstance(found, list) else [found]


def list_classes(metainfo: dict | None) -> list[str]:
    """Return the classes in a data set's metainfo, which are a list, one name, or a file with a name per line."""
    classes = (metainfo or {}).get('classes') or []
    if isinstance(classes, str):
        return Path(classes).read_text(encoding='utf-8').splitlines() if Path(classes).is_file() else [classes]
    return list(classes)


def list_configured_classes(dataset: dict) -> list[str]:
    """List the classes of a data set's config: those of its metainfo, or else of its class's METAINFO."""
    return list_classes(dataset.get('metainfo')) or list(find_class(dataset, DATASETS).METAINFO.get('classes') or ())


def list_stated_classes(dataset: dict) -> list[str]:
    """List the classes that a config defines for a data set, in its metainfo or by a type with its own classes."""
    classes = list_configured_classes(dataset)
    inherited = not list_classes(dataset.get('metainfo')) and classes == list(CocoDataset.METAINFO['classes'])
    return [] if inherited else classes


def state_classes_once(cfg: Config) -> list[str]:
    """Set the classes of all data sets in a config to those of one of them; changes ``cfg``.

    Returns:
        These classes; empty if no data set defines any, so that the annotation files do.

    Raises:
        InputError: if two data sets define different classes, or one uses MMDetection 2's key CLASSES.
    """
    stated: dict[str, list[str]] = {}
    for loop in LOOPS:
        for name, dataset in walk(cfg.get(f'{loop}_dataloader'), f'{loop}_dataloader'):
            if not is_coco_dataset(dataset):
                continue
            for place, metainfo in (
                (f'{name}.metainfo', dataset.get('metainfo') or {}),
                (f'{name}.type.METAINFO', find_class(dataset, DATASETS).METAINFO),
            ):
                if 'CLASSES' in metainfo:
                    raise InputError(f'{place}.CLASSES in the config: rename it to "classes", as MMDetection 3 expects')
            if classes := list_stated_classes(dataset):
                stated[f'{name}.metainfo.classes'] = classes
    if not stated:
        return []
    (first, classes), *others = stated.items()
    for name, other in others:
        if set(other) != set(classes):
            raise InputError(
                f'{name} is ({list_briefly(other)}) and {first} is ({list_briefly(classes)}) in the config. Use '
                'the same classes in both'
            )
    for dataset in list_coco_datasets({**cfg}):
        dataset['metainfo'] = dict(dataset.get('metainfo') or {}, classes=tuple(classes))
    return classes


def require_one_annotation_file(cfg: Config, loops: Sequence[str]) -> None:
    """Check that each loop has one data set in COCO's format, and that its evaluators read the same annotation file.

    Raises:
        InputError: if an evaluator reads a different existing file, or COCO metrics would mix several data sets.
    """
    for loop in loops:
        datasets = list(list_coco_datasets(cfg.get(f'{loop}_dataloader')))
        metrics = list_coco_metrics(cfg, loop)
        if metrics and len(datasets) > 1:
            files = list_briefly([str(dataset.get('ann_file')) for dataset in datasets])
            raise InputError(
                f'{loop}_dataloader in the config has {len(datasets)} data sets ({files}), which one evaluator would '
                'mix. Evaluate them in separate runs, or merge their annotation files'
            )
        for evaluator in metrics if datasets else ():
            measured, predicted = evaluator.get('ann_file'), datasets[0].get('ann_file')
            if isinstance(measured, str) and isinstance(predicted, str):
                files = Path(measured), Path(datasets[0].get('data_root') or '', predicted)
                if all(path.is_file() for path in files) and not files[0].samefile(files[1]):
                    raise InputError(
                        f'{loop}_evaluator.ann_file is {files[0]} and {loop}_dataloader.dataset.ann_file is {files[1]} '
                        'in the config. Set both to the same file'
                    )


def require_monitored_metrics(cfg: Config) -> None:
    """Check that the evaluators compute the metrics by which hooks choose checkpoints or stop.

    Metrics of evaluators other than COCO's are not checked.

    Raises:
        InputError: naming the hook.
    """
    metrics = list_coco_metrics(cfg, 'val')
    if not metrics or len(metrics) < len(list_evaluators(cfg, 'val')):
        return
    names, unlisted = [], []  # names of metrics; parts of other names, which depend on classes or limits of detections
    for evaluator in metrics:
        if unknown := {*list_kinds(evaluator)} - {'bbox', 'segm', 'proposal', 'proposal_fast'}:
            raise InputError(f'val_evaluator.metric in the config is {", ".join(unknown)}. Use bbox or segm')
        prefix = evaluator.get('prefix') or find_class(evaluator, METRICS).default_prefix
        items = evaluator.get('metric_items') or ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        names += [f'{prefix}/{kind}_{i}' for kind in list_kinds(evaluator) for i in items if kind in ('bbox', 'segm')]
        unlisted += ['_precision'] * bool(evaluator.get('classwise'))
        unlisted += ['/AR'] * any(kind.startswith('proposal') for kind in list_kinds(evaluator))
    require_monitored(cfg, names, unlisted)


def require_monitored(cfg: Config, names: Sequence[str], unlisted: Sequence[str] = ()) -> None:
    """Raise InputError if a hook monitors a metric without one of these names, or one of these parts of a name."""
    for hook, key in list_monitoring_hooks(cfg):
        for wanted in [hook[key]] if isinstance(hook[key], str) else hook[key]:
            if wanted not in ('auto', *names) and not any(part in wanted for part in unlisted):
                raise InputError(
                    f'{key} of {hook.get("type", "a hook")} in the config is {wanted}, which val_evaluator does not '
                    f'compute. Use {" or ".join(get_close_matches(wanted, names, 2, 0))}'
                )


def list_kinds(evaluator: dict) -> list[str]:
    """List the kinds of COCO's metrics in an evaluator's config, for instance 'bbox' and 'segm'."""
    kinds = evaluator.get('metric', 'bbox')
    return [kinds] if isinstance(kinds, str) else list(kinds)


def list_monitoring_hooks(cfg: Config) -> Iterator[tuple[dict, str]]:
    """Yield the configs of hooks that monitor a metric, with the key of its name."""
    for hook in [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]:
        for key in ('save_best', 'monitor'):  # of checkpoints, of early stopping
            if isinstance(hook, dict) and hook.get(key):
                yield hook, key


def find_class_heads(model: dict | None) -> Iterator[tuple[str, dict, str]]:
    """Yield the name and config of every part of a head with a number of classes, and the key of that number.

    The key may be absent if the part's class has a default.
    """
    for name, node in walk(model or {}, 'model'):
        keys = name.split('.')
        if any('head' in part for part in keys) and not set(keys) & {*NOT_OF_THE_CLASSES}:
            for key in ('num_classes', 'num_things_classes'):  # the latter of MaskFormer and Mask2Former
                if key in node or has_default_above_one(find_class(node, MODELS), key):
                    yield name, node, key


def has_default_above_one(kind: type | None, key: str) -> bool:
    """Return whether a class has an argument with an integer above 1 as default."""
    parameters = (inspect.signature(cls.__init__).parameters.get(key) for cls in inspect.getmro(kind or object))
    default = next((parameter.default for parameter in parameters if parameter), None)
    return isinstance(default, int) and default > 1


def drop_stuff_branch(cfg: Config) -> bool:
    """Remove the branch of a two-stage detector (HTC, SCNet) that is trained with stuff maps, if there are none.

    Returns:
        Whether ``cfg`` was changed.
    """
    head = (cfg.get('model') or {}).get('roi_head') or {}
    if not head.get('semantic_head'):
        return False
    for dataset in list_coco_datasets(cfg.get('train_dataloader')):
        maps = (dataset.get('data_prefix') or {}).get('seg')
        if maps and Path(dataset.get('data_root') or '', maps).is_dir():
            return False
        dataset.get('data_prefix', {}).pop('seg', None)
    head.update(semantic_head=None, semantic_roi_extractor=None)
    for _, node in walk(cfg.get('train_dataloader')):
        if node.get('with_seg'):
            node['with_seg'] = False
    return True


def set_classes(cfg: Config, classes: Sequence[str], source: str = 'the data') -> None:
    """Set the classes, in this order, of a config's data sets and of the heads of its model; changes ``cfg``.

    Args:
        cfg: the complete config.
        classes: their names.
        source: their origin, for messages.

    Raises:
        InputError: if the number of classes of a head was set by hand: it equals neither ``len(classes)``, nor COCO's
            80, nor the number of classes of the data sets so far.
    """
    inherited = {len(list_configured_classes(dataset)) for dataset in list_coco_datasets({**cfg})}
    inherited |= {len(CocoDataset.METAINFO['classes']), len(classes)}
    for name, head, key in find_class_heads(cfg.get('model')):
        if head.setdefault(key, len(classes)) not in inherited:
            raise InputError(
                f'{name}.{key} is {head[key]} in the config, but {source} has {len(classes)} classes '
                f'({list_briefly(classes)}). Remove {key}; it is set from the data'
            )
        for _, loss in walk(head):
            weights = loss.get('class_weight')
            if isinstance(weights, (list, tuple)) and len(set(weights[: head[key]])) == 1 and len(weights) >= head[key]:
                loss['class_weight'] = [weights[0]] * len(classes) + list(weights[head[key] :])
        head[key] = len(classes)
        if 'num_queries' in head and key == 'num_things_classes':  # MaskFormer fails where it has fewer detections
            most, test_cfg = head['num_queries'] * len(classes), cfg.model.setdefault('test_cfg', {})
            test_cfg['max_per_image'] = min(test_cfg.get('max_per_image', 100), most)
    metainfo = dict(classes=tuple(classes))
    if len(classes) > 80:
        metainfo['palette'] = None  # COCO's palette has 80 colours; None generates one
    for dataset in list_coco_datasets({**cfg}):
        dataset['metainfo'] = {**(dataset.get('metainfo') or {}), **metainfo}


def require_class_weights(cfg: Config) -> None:
    """Check that each loss of a head that weights the classes has as many weights as the head has scores.

    Raises:
        InputError: naming the loss.
    """
    for head, node, key in find_class_heads(cfg.get('model')):
        for name, loss in walk(node, head):
            weights = loss.get('class_weight')
            count = node.get(key, 0) + node.get('num_stuff_classes', 0) + (not loss.get('use_sigmoid'))
            if isinstance(weights, (list, tuple)) and len(weights) != count and not loss.get('use_mask'):
                background = '' if loss.get('use_sigmoid') else ' and the background'
                raise InputError(
                    f'{name}.class_weight in the config has {len(weights)} numbers for {node[key]} classes'
                    f'{background}. Use {count}'
                )


def drop_pretrained(model: dict | None) -> None:
    """Remove pretrained weights from a model's config, because a checkpoint contains all weights; changes it."""
    for _, node in walk(model or {}):
        found = node.get('init_cfg')
        found = found if isinstance(found, list) else [found]
        if any(isinstance(init, dict) and 'checkpoint' in init for init in found):
            node['init_cfg'] = [init for init in found if 'checkpoint' not in init] or None
        if isinstance(node.get('pretrained'), str):  # before MMDetection 3
            node['pretrained'] = None


def has_masks(model: dict | None) -> bool:
    """Return whether a detector's config predicts masks, so that training needs them."""
    for _, node in walk(model or {}):
        if any(isinstance(node.get(key), (dict, list)) and node[key] for key in MASK_HEADS):
            return True
        if str(node.get('type', '')).startswith('RTMDetIns'):  # its bbox_head predicts masks
            return True
    return False


def use_masks_as_the_model(cfg: Config) -> bool:
    """Make a config load and evaluate masks if and only if its model predicts them; changes ``cfg``.

    Without masks in the evaluation, the best checkpoint is chosen by box metrics.

    Returns:
        Whether anything was changed.
    """
    before = cfg.to_dict()
    masks = has_masks(cfg.get('model'))
    for loop in LOOPS:
        for _, transform in walk(cfg.get(f'{loop}_dataloader')):
            if is_kind_of(transform, TRANSFORMS, LoadAnnotations) and (loop == 'train' or not masks):
                transform['with_mask'] = masks
        for evaluator in list_coco_metrics(cfg, loop) if not masks else ():
            if 'segm' in list_kinds(evaluator):
                evaluator['metric'] = [kind for kind in list_kinds(evaluator) if kind != 'segm'] or ['bbox']
    metrics = list_coco_metrics(cfg, 'val')
    if metrics and not any('segm' in list_kinds(evaluator) for evaluator in metrics):
        for hook, key in list_monitoring_hooks(cfg):
            if isinstance(hook[key], str):
                hook[key] = hook[key].replace('segm_', 'bbox_')
    return cfg.to_dict() != before
