"""A config is fitted to its data for any name of the data set: a subclass, a name with a scope, or a class."""

import json
from contextlib import nullcontext
from pathlib import Path

import mmdet
import pytest
from conftest import ROOT
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, MODELS
from mmengine.config import Config

from spec_mmdet import InputError
from spec_mmdet.data.checks import check_inputs
from spec_mmdet.data.fitting import (
    drop_stuff_branch,
    list_coco_datasets,
    list_coco_metrics,
    list_configured_classes,
    list_stated_classes,
    require_class_weights,
    require_monitored_metrics,
    require_one_annotation_file,
    set_classes,
    state_classes_once,
    use_masks_as_the_model,
)
from spec_mmdet.data.reading import CheckedCocoDataset

MASK2FORMER = 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
NAMES = ('circle', 'square', 'triangle', 'star')


@pytest.fixture(scope='module', autouse=True)
def registered():
    """Register what a user's own module would register."""

    class ShapesDataset(CocoDataset):
        METAINFO = dict(classes=NAMES)

    class OldShapesDataset(CocoDataset):
        METAINFO = dict(CLASSES=NAMES)

    class ShapesMetric(CocoMetric):
        pass

    for kind in (ShapesDataset, OldShapesDataset):
        DATASETS.register_module(module=kind)
    METRICS.register_module(module=ShapesMetric)
    yield ShapesDataset, ShapesMetric
    for registry, kind in ((DATASETS, 'ShapesDataset'), (DATASETS, 'OldShapesDataset'), (METRICS, 'ShapesMetric')):
        del registry.module_dict[kind]


def config(root, kind) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / 'xcit_spec_shapes.py')
    for loop in ('train', 'val', 'test'):
        cfg[f'{loop}_dataloader'].dataset.update(type=kind, data_root=f'{root}/')
        if loop != 'train':
            cfg[f'{loop}_evaluator'].ann_file = str(root / 'annotations' / 'instances_val.json')
    return cfg


def fit(cfg: Config) -> list[str]:
    """Fit a config in the order of train and test."""
    state_classes_once(cfg)
    classes = check_inputs(cfg, ('train', 'val'), thorough=False)
    set_classes(cfg, classes)
    return classes


def widths(cfg: Config) -> set[int]:
    return {cfg.model.roi_head[f'{kind}_head'].num_classes for kind in ('bbox', 'mask')}


@pytest.mark.parametrize('spelling', ['ShapesDataset', 'mmdet.ShapesDataset', 'class'])
def test_a_subclass_has_its_own_classes(shapes, registered, spelling):
    cfg = config(shapes, registered[0] if spelling == 'class' else spelling)
    assert list_stated_classes(cfg.train_dataloader.dataset) == list(NAMES)
    assert fit(cfg) == list(NAMES) and widths(cfg) == {4}
    assert list_configured_classes(cfg.test_dataloader.dataset) == list(NAMES)


@pytest.mark.parametrize('spelling', ['CocoDataset', 'mmdet.CocoDataset', CocoDataset, CheckedCocoDataset])
def test_classes_of_the_file_replace_cocos(shapes, spelling):
    cfg = config(shapes, spelling)
    assert len(list_configured_classes(cfg.train_dataloader.dataset)) == 80
    assert fit(cfg) == list(NAMES) and widths(cfg) == {4}


def test_a_subclass_with_classes_that_differ_from_the_file(tmp_path, shapes):
    cfg = config(shapes, 'ShapesDataset')
    content = json.loads((shapes / 'annotations' / 'instances_train.json').read_text())
    content['categories'] = content['categories'][::-1]
    (tmp_path / 'train.json').write_text(json.dumps(content))
    cfg.train_dataloader.dataset.ann_file = str(tmp_path / 'train.json')
    with pytest.raises(InputError, match='train.json.*4 trained classes.*order'):
        fit(cfg)


def test_classes_in_the_spelling_of_mmdetection_2(shapes):
    with pytest.raises(InputError, match='train_dataloader.dataset.type.METAINFO.CLASSES'):
        fit(config(shapes, 'OldShapesDataset'))


def test_wrappers_other_formats_and_undefined_names(registered):
    inside = [dict(type='CocoDataset'), dict(type='mmdet.ShapesDataset'), dict(type=CheckedCocoDataset)]
    others = [dict(type=kind) for kind in ('CocoPanopticDataset', 'LVISV1Dataset', 'VOCDataset', 'antigravity', 'a.b')]
    loader = dict(dataset=dict(type='ConcatDataset', datasets=[*others, *inside]))
    assert list(list_coco_datasets(loader)) == inside


@pytest.mark.parametrize('kind', ['CocoMetric', 'mmdet.ShapesMetric', 'FastCocoMetric', CocoMetric])
def test_metrics(kind):
    cfg = Config(dict(test_evaluator=[dict(type='LVISMetric'), dict(type='DumpDetResults'), dict(type=kind)]))
    assert list_coco_metrics(cfg, 'test') == [cfg.test_evaluator[2]]


def test_several_data_sets_under_one_metric(shapes):
    cfg = config(shapes, 'CheckedCocoDataset')
    one = cfg.val_dataloader.dataset
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[one, dict(one, ann_file='b.json')])
    require_one_annotation_file(cfg, ['train'])
    with pytest.raises(InputError, match='val_dataloader.* 2 data sets .*b.json'):
        require_one_annotation_file(cfg, ['train', 'val'])


@pytest.mark.parametrize(
    ('settings', 'rejected'),
    [
        ({'default_hooks.checkpoint.save_best': 'coco/bbox_mAP_50'}, ''),
        ({'default_hooks.checkpoint.save_best': ['auto', 'coco/segm_mAP']}, ''),
        ({'default_hooks.checkpoint.save_best': 'bbox_mAP'}, 'save_best.*bbox_mAP, .*coco/bbox_mAP'),
        ({'default_hooks.checkpoint.save_best': 'coco/person_precision'}, 'coco/person_precision'),
        ({'default_hooks.checkpoint.save_best': 'coco/person_precision', 'val_evaluator.classwise': True}, ''),
        ({'default_hooks.checkpoint.save_best': 'coco/AR@100', 'val_evaluator.metric': ['bbox', 'proposal']}, ''),
        ({'default_hooks.stop': dict(type='EarlyStoppingHook', monitor='coco/mAP')}, 'monitor of EarlyStoppingHook'),
        ({'val_evaluator.metric': 'bbox'}, ''),  # the best checkpoint is then chosen by boxes
        ({'val_evaluator.prefix': 'mine'}, 'save_best.*coco/segm_mAP, .*mine/segm_mAP'),
        ({'val_evaluator': [dict(type='VOCMetric')]}, ''),
    ],
    ids=str,
)
def test_metrics_that_hooks_monitor(shapes, settings, rejected):
    cfg = config(shapes, 'CheckedCocoDataset')
    cfg.merge_from_dict(settings)
    use_masks_as_the_model(cfg)
    with pytest.raises(InputError, match=rejected) if rejected else nullcontext():
        require_monitored_metrics(cfg)


@pytest.mark.parametrize(('weights', 'sigmoid', 'says'), [
    ([1.0] * 5, False, None),
    ([1.0] * 4, False, r'bbox_head.loss_cls.class_weight .* has 4 numbers .* Use 5'),
    ([1.0] * 4, True, None),
    ([1.0] * 5, True, r'has 5 numbers .* Use 4'),
    (1.0, False, None),
])  # fmt: skip
def test_class_weights_match_the_number_of_scores(tmp_path, weights, sigmoid, says):
    cfg = config(tmp_path, 'CocoDataset')
    cfg.model.roi_head.bbox_head.loss_cls.update(class_weight=weights, use_sigmoid=sigmoid)
    set_classes(cfg, NAMES)
    with pytest.raises(InputError, match=says) if says else nullcontext():
        require_class_weights(cfg)


def test_default_numbers_of_classes_follow_the_data(tmp_path):
    cfg = config(tmp_path, 'CocoDataset')
    del cfg.model.roi_head.bbox_head.num_classes
    cfg.model.roi_head.mask_head.loss_mask = dict(type='SeesawLoss')  # 1203
    set_classes(cfg, NAMES)
    assert widths(cfg) == {4} and cfg.model.roi_head.mask_head.loss_mask.num_classes == 4
    assert 'num_classes' not in cfg.model.rpn_head


def test_htc_without_stuff_maps(tmp_path):
    cfg = Config.fromfile(Path(mmdet.__path__[0], '.mim/configs/htc/htc_r50_fpn_1x_coco.py'))
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = f'{tmp_path}/'
    (tmp_path / dataset.data_prefix.seg).mkdir(parents=True)
    assert not drop_stuff_branch(cfg) and cfg.model.roi_head.semantic_head
    (tmp_path / dataset.data_prefix.seg).rmdir()
    assert drop_stuff_branch(cfg) and not drop_stuff_branch(cfg)
    assert MODELS.build(cfg.model.roi_head | dict(train_cfg=None, test_cfg=None)).with_semantic is False
    assert [step.with_seg for step in dataset.pipeline if step.type == 'LoadAnnotations'] == [False]


def test_heads_of_mask2former_follow_the_data():
    cfg = Config.fromfile(ROOT / 'configs' / 'xcit_spec_shapes.py')
    cfg.model = Config.fromfile(Path(mmdet.__path__[0], '.mim/configs', MASK2FORMER)).model
    set_classes(cfg, NAMES)
    head = cfg.model.panoptic_head
    assert head.num_things_classes == cfg.model.panoptic_fusion_head.num_things_classes == 4
    assert head.loss_cls.class_weight == [1.0] * 4 + [0.1]
    assert cfg.model.test_cfg.max_per_image == 100
    head.num_queries = 10
    set_classes(cfg, NAMES)
    assert cfg.model.test_cfg.max_per_image == 40
    require_class_weights(cfg)
    head.loss_cls.class_weight.pop()
    with pytest.raises(InputError, match='has 4 numbers .* Use 5'):
        require_class_weights(cfg)
