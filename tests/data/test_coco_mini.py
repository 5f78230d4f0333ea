"""Read real COCO annotations by the configs' own data sets and evaluator."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmdet.registry import DATASETS, METRICS
from mmdet.structures.mask import encode_mask_results
from mmengine.config import Config

from spec_mmdet.data.checks import check_inputs


@pytest.fixture(scope='module')
def config(coco_mini):
    cfg = Config.fromfile(ROOT / 'configs' / 'xcit_spec_maskrcnn.py')
    for loop in ('train', 'val', 'test'):
        cfg[f'{loop}_dataloader'].dataset.data_root = f'{coco_mini}/'
        if loop != 'train':
            cfg[f'{loop}_evaluator'].ann_file = str(coco_mini / 'annotations' / 'instances_val2017.json')
    check_inputs(cfg, ('train', 'val', 'test'))
    return cfg


def test_the_truth_evaluates_to_an_ap_of_one(config):
    dataset_cfg = copy.deepcopy(config.val_dataloader.dataset)
    dataset_cfg.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape')),
    ]
    dataset = DATASETS.build(dataset_cfg)
    metric = METRICS.build(config.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for item in dataset:
        sample = item['data_samples']
        truth = sample.gt_instances
        masks = encode_mask_results(truth.masks.to_ndarray())
        found = dict(bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth.labels)), masks=masks)
        metric.process({}, [dict(sample.metainfo, pred_instances=found)])
    assert len(dataset) == 136
    values = metric.evaluate(len(dataset))
    assert values['coco/bbox_mAP'] == 1.0
    # MMDetection rasterises an object's parts one by one, pycocotools together: they differ in a few pixels.
    assert values['coco/segm_mAP'] > 0.99


def test_training_batches_hold_whole_objects(config):
    dataset = DATASETS.build(config.train_dataloader.dataset)
    assert len(dataset.metainfo['classes']) == 80
    np.random.seed(0)
    for index in range(0, len(dataset), 16):
        item = dataset[index]
        truth = item['data_samples'].gt_instances
        height, width = item['inputs'].shape[1:]
        assert max(height, width) <= 1333 and min(height, width) <= 800
        masks = truth.masks.to_ndarray()
        assert masks.shape[1:] == (height, width)
        for mask, (x0, y0, x1, y1) in zip(masks, truth.bboxes.tensor.tolist()):
            rows, columns = np.nonzero(mask)
            if len(rows):  # the mask follows its box through resizing, flips and crops, to a pixel or two
                assert x0 - 3 <= columns.min() and columns.max() < x1 + 3
                assert y0 - 3 <= rows.min() and rows.max() < y1 + 3
