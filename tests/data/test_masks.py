"""Polygons give the same objects as bitmaps, in little memory, and are used where model and transforms accept them."""

import tracemalloc

import numpy as np
import pytest
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from pycocotools import mask as mask_utils

from spec_mmdet.configs import CONFIGS, read_config
from spec_mmdet.data.fitting import use_masks_as_the_model
from spec_mmdet.data.masks import use_polygons
from spec_mmdet.substitution import substitute_types

RLE = mask_utils.encode(np.asfortranarray(np.pad(np.ones((9, 9), np.uint8), ((10, 21), (10, 11)))))
RLE['counts'] = RLE['counts'].decode()
SQUARE = dict(bbox=[3, 3, 14, 14], bbox_label=0, mask=[[3, 3, 14, 3, 14, 14, 3, 14]], ignore_flag=0)
CROWD = dict(bbox=[10, 10, 19, 19], bbox_label=0, mask=RLE, ignore_flag=1)


def load(instances: list[dict], size: tuple[int, int], polygons: bool, *then: dict) -> dict:
    """Return what the transform and others make of an image's objects."""
    transform = dict(type='CheckedLoadAnnotations', with_mask=True, poly2mask=not polygons)
    results = dict(instances=instances, ori_shape=size, img_shape=size, img=np.zeros((*size, 3), np.uint8))
    return Compose([TRANSFORMS.build(step) for step in (transform, *then)])(results)


def test_polygons_with_integers_are_not_rounded_by_a_resize():
    resize = dict(type='Resize', scale=(15, 20), keep_ratio=False)
    masks = load([SQUARE], (40, 30), True, resize)['gt_masks']
    assert isinstance(masks, PolygonMasks) and masks.masks[0][0].tolist() == [1.5, 1.5, 7, 1.5, 7, 7, 1.5, 7]


def test_the_mask_of_an_rle_crowd_is_its_box():
    crop = dict(type='RandomCrop', crop_size=(40, 15), recompute_bbox=True)
    np.random.seed(0)
    results = load([SQUARE, CROWD], (40, 30), True, crop)
    assert isinstance(results['gt_masks'], PolygonMasks)
    assert results['gt_ignore_flags'].tolist() == [False, True] and results['instances'] == [SQUARE, CROWD]
    np.random.seed(0)
    expected = load([SQUARE, CROWD], (40, 30), False, crop)
    assert results['gt_bboxes'].tensor.tolist() == expected['gt_bboxes'].tensor.tolist()


def test_an_image_with_an_rle_object_gets_bitmaps():
    counted = dict(CROWD, ignore_flag=0)
    for instances in ([SQUARE, counted], [counted]):
        masks = load(instances, (40, 30), True)['gt_masks']
        assert (
            isinstance(masks, BitmapMasks) and (masks.masks == load(instances, (40, 30), False)['gt_masks'].masks).all()
        )
        assert masks.masks[-1].sum() == 81
    transform = TRANSFORMS.build(dict(type='CheckedLoadAnnotations', with_mask=True, poly2mask=False))
    kinds = [type(transform(dict(instances=i, ori_shape=(40, 30)))['gt_masks']) for i in ([counted], [SQUARE])]
    assert kinds == [BitmapMasks, PolygonMasks]


def test_many_objects_of_a_large_image_need_little_memory():
    instances = [dict(SQUARE, mask=[[3.5, 3, 7000, 3, 7000, 5000, 3, 5000]]) for _ in range(1500)]
    transform = TRANSFORMS.build(dict(type='CheckedLoadAnnotations', with_mask=True, poly2mask=False))
    tracemalloc.start()
    transform(dict(instances=instances, ori_shape=(6000, 8000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # with bitmaps 72 GB


@pytest.mark.parametrize(
    ('name', 'required'),
    [
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', []),
        ('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', []),
        ('mmdet::solo/solo_r50_fpn_1x_coco.py', ['SOLO', 'SOLOHead']),
        ('mmdet::ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py', ['MaskScoringRoIHead']),
    ],
)
def test_bitmaps_are_kept_where_the_model_needs_them(tmp_path, name, required):
    (tmp_path / 'config.py').write_text(f'_base_ = {name!r}\n')
    cfg = read_config(tmp_path / 'config.py')
    substitute_types(cfg)
    use_masks_as_the_model(cfg)
    assert use_polygons(cfg) == required
    assert cfg.train_dataloader.dataset.pipeline[1].poly2mask is bool(required)


@pytest.mark.parametrize('kind', ['Expand', 'Rotate', 'CopyPaste', 'Albu', 'NotRegistered'])
def test_bitmaps_are_kept_where_a_transform_needs_them(kind):
    cfg = read_config(CONFIGS / 'xcit_maskrcnn.py')
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert pipeline[1].pop('poly2mask') is False
    pipeline.insert(2, dict(type='RandomApply', transforms=[dict(type=kind)]))
    assert use_polygons(cfg) == [kind] and pipeline[1].poly2mask is True
    pipeline.pop(2)
    assert use_polygons(cfg) == [] and pipeline[1].poly2mask is True  # what the config states stays
    del pipeline[1].poly2mask
    assert use_polygons(cfg) == [] and pipeline[1].poly2mask is False
