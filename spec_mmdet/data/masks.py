"""Load masks as polygons, which need far less memory than bitmaps, wherever transforms and model can use them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.registry import Registry

from ..configs import find_class, is_kind_of, walk
from .fitting import LOOPS

# Transforms and heads of MMDetection, MMCV and this package that accept polygons.
SUITABLE_TRANSFORMS = frozenset(
    'CheckedLoadAnnotations CheckedLoadImageFromFile FilterAnnotations FixShapeResize LoadImageFromFile '  # noqa: SIM905
    'MinIoURandomCrop PackDetInputs Pad PhotoMetricDistortion RandomApply RandomChoice RandomChoiceResize RandomCrop '
    'RandomFlip RandomResize Resize YOLOXHSVRandomAug'.split()
)
SUITABLE_HEADS = dict(
    mask_head=frozenset({'FCNMaskHead', 'HTCMaskHead'}),
    roi_head=frozenset({'CascadeRoIHead', 'HybridTaskCascadeRoIHead', 'StandardRoIHead'}),
)


@TRANSFORMS.register_module()
class CheckedLoadAnnotations(LoadAnnotations):
    """MMDetection's LoadAnnotations whose polygons (``poly2mask=False``) are as good as bitmaps.

    MMDetection would round polygons with integer coordinates when it resizes them, and ignore objects with RLE masks.
    Here, an image with such an object gets bitmaps, and the mask of an RLE crowd is its box, because training uses only
    the box of an ignored object.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.keeps_polygons = not self.poly2mask

    def transform(self, results: dict) -> dict:
        """Load the annotations of ``results['instances']``; see MMDetection."""
        instances = results.get('instances')
        if instances is None or not (self.with_mask and self.keeps_polygons):
            return super().transform(results)
        suited = [{**instance, 'mask': suit_mask(instance)} for instance in instances]
        self.poly2mask = any(isinstance(instance['mask'], dict) for instance in suited)
        return {**super().transform({**results, 'instances': suited}), 'instances': instances}


def suit_mask(instance: dict) -> object:
    """Return an object's mask as float polygons, or as RLE if it is one and not ignored."""
    if isinstance(instance['mask'], list):
        return [np.array(polygon, float) for polygon in instance['mask']]
    if instance['ignore_flag']:
        x0, y0, x1, y1 = instance['bbox']
        return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], float)]
    return instance['mask']


def use_polygons(cfg: Config) -> list[str]:
    """Load masks as polygons in each loop of a config whose model and transforms can use them; changes ``cfg``.

    A ``poly2mask`` in the config stays.

    Returns:
        The types because of which training loads bitmaps.
    """
    required = []
    for loop in LOOPS:
        loader = cfg.get(f'{loop}_dataloader')
        loading = [node for _, node in walk(loader) if is_kind_of(node, TRANSFORMS, CheckedLoadAnnotations)]
        undecided = [node for node in loading if node.get('with_mask') and 'poly2mask' not in node]
        reasons = list(dict.fromkeys(find_bitmap_users(cfg.get('model') or {}, loader))) if undecided else []
        for node in undecided:
            node['poly2mask'] = bool(reasons)
        required += reasons if loop == 'train' else []
    return required


def find_bitmap_users(model: dict, loader: dict) -> Iterator[str]:
    """Yield the types in a loader's pipelines and a model's heads that may need bitmaps."""
    for name, node in walk(loader):
        if 'pipeline' in name.split('.') and 'type' in node:
            yield from name_unless(SUITABLE_TRANSFORMS, node, TRANSFORMS)
    if 'roi_head' not in model:
        yield str(model.get('type'))
    for name, node in walk(model):
        part = name.rstrip('.0123456789').rpartition('.')[2]  # a cascade has a list of heads
        if 'type' in node and part in SUITABLE_HEADS:
            yield from name_unless(SUITABLE_HEADS[part], node, MODELS)
        if node.get('soft_mask_target'):
            yield 'soft_mask_target'


def name_unless(suitable: frozenset[str], node: dict, registry: Registry) -> Iterator[str]:
    """Yield the type of a config's dict unless it is one of these names of MMDetection, MMCV or this package."""
    kind = find_class(node, registry)
    name = kind.__name__ if kind else str(node['type'])
    if not kind or name not in suitable or kind.__module__.partition('.')[0] not in ('mmcv', 'mmdet', 'spec_mmdet'):
        yield name
