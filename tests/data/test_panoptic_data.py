"""Panoptic data: the generated labels agree with their objects, and the checks find each fault in one line."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from mmdet.datasets import CocoPanopticDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from pycocotools.coco import COCO

from spec_mmdet.conditioning import describe_conditioning
from spec_mmdet.configs import read_config
from spec_mmdet.data import shapes
from spec_mmdet.data.panoptic import Classes, read_ids, set_classes
from spec_mmdet.data.rules import encode_ids
from spec_mmdet.data.tasks import find_task, use_folder
from spec_mmdet.errors import InputError

CONFIG = 'configs/xcit_spec_panoptic_shapes.py'
NAMES = [*shapes.CATEGORIES, *shapes.STUFF]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('panoptic') / 'shapes'
    shapes.write_shapes(root, train=12, val=6, size=96, seed=3)
    return root


def load(root: Path, name: str = CONFIG):
    cfg = read_config(Path(__file__).parents[2] / name)
    use_folder(cfg, root, ('train', 'val', 'test'))
    return cfg


def test_the_generated_labels_agree_with_the_objects(folder):
    coco = COCO(str(folder / 'annotations' / 'instances_train.json'))
    panoptic = json.loads((folder / 'annotations' / 'panoptic_train.json').read_text())
    kinds = {c['id']: (c['name'], c['isthing']) for c in panoptic['categories']}
    assert list(kinds.values()) == [(name, int(name in shapes.CATEGORIES)) for name in NAMES]
    seen, void = set(), 0
    for annotation in panoptic['annotations']:
        ids = read_ids(folder / 'annotations' / 'panoptic_train' / annotation['file_name'])
        objects = coco.imgToAnns[annotation['image_id']]
        segments = annotation['segments_info']
        assert {s['id'] for s in segments} == {*np.unique(ids).tolist()} - {0}
        assert [(s['category_id'], s['iscrowd']) for s in segments if kinds[s['category_id']][1]] == [
            (o['category_id'], o['iscrowd']) for o in objects
        ]
        for segment, own in zip(segments, objects):
            mask, whole = ids == segment['id'], coco.annToMask(own) > 0
            assert (mask <= whole).all() and (mask & whole).sum() >= 0.9 * whole.sum()
        for segment in segments:
            rows, columns = np.nonzero(ids == segment['id'])
            x, y, w, h = segment['bbox']
            assert segment['area'] == len(rows) and (columns.min(), rows.min()) == (x, y)
            assert (columns.max() + 1, rows.max() + 1) == (x + w, y + h)
            seen.add(segment['category_id'])
        void += (ids == 0).sum()
    assert seen == {*kinds} and void < 0.05 * 12 * 96 * 96


def test_the_data_set_gives_what_the_png_contains(folder):
    cfg = load(folder)
    assert find_task(cfg).adapt(cfg, ('train', 'val'), None, True, True) == NAMES
    cfg.train_dataloader.dataset.pipeline = cfg.train_dataloader.dataset.pipeline[:2]
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    panoptic = json.loads((folder / 'annotations' / 'panoptic_train.json').read_text())
    for item, annotation in zip(dataset, panoptic['annotations']):
        ids = read_ids(folder / 'annotations' / 'panoptic_train' / annotation['file_name'])
        expected = np.full(ids.shape, 255)
        for segment in annotation['segments_info']:
            expected[ids == segment['id']] = segment['category_id'] - 1
        assert (item['gt_seg_map'] == expected).all()
        things = [s for s in annotation['segments_info'] if s['category_id'] <= 4 and not s['iscrowd']]
        assert (item['gt_masks'].masks == np.array([ids == s['id'] for s in things])).all()
        assert item['gt_bboxes_labels'].tolist() == [s['category_id'] - 1 for s in things]


def test_things_come_first_and_heads_follow(folder, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(folder, root)
    for split in ('train', 'val'):
        path = root / 'annotations' / f'panoptic_{split}.json'
        content = json.loads(path.read_text())
        content['categories'].reverse()
        path.write_text(json.dumps(content))
    cfg = load(root, 'configs/xcit_mask2former.py')
    assert [evaluator.type for evaluator in cfg.val_evaluator] == ['PanopticQuality', 'FastCocoMetric']
    found = find_task(cfg).adapt(cfg, ('train', 'val'), None, True, True)
    expected = [*shapes.CATEGORIES[::-1], *shapes.STUFF[::-1]]
    assert found == expected and found.things == 4
    assert list(cfg.val_dataloader.dataset.metainfo['stuff_classes']) == expected[4:]
    for head in (cfg.model.panoptic_head, cfg.model.panoptic_fusion_head):
        assert (head.num_things_classes, head.num_stuff_classes) == (4, 2)
    assert cfg.model.panoptic_head.loss_cls.class_weight == [1.0] * 6 + [0.1]
    cfg = load(root, 'configs/xcit_panopticfpn.py')
    set_classes(cfg, found)
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 4
    assert cfg.model.rpn_head.get('num_classes', 1) == 1 and cfg.model.semantic_head.num_stuff_classes == 2
    with pytest.raises(InputError, match='number of things'):
        set_classes(load(root), ['a', 'b'])
    set_classes(cfg, NAMES and expected)  # those of the config


@pytest.mark.parametrize('name', ['xcit_mask2former', 'xcit_spec_mask2former'])
def test_mask2former_predicts_cocos_categories(name):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    before = cfg.to_dict()
    classes = Classes(CocoPanopticDataset.METAINFO['classes'])
    classes.things = len(CocoPanopticDataset.METAINFO['thing_classes'])
    set_classes(cfg, classes)
    assert cfg.model.to_dict() == before['model']
    model = MODELS.build(cfg.model)
    assert (len(classes), classes.things) == (133, 80) and model.panoptic_head.cls_embed.out_features == 133 + 1
    fusion = model.panoptic_fusion_head
    assert (fusion.num_things_classes, fusion.num_stuff_classes) == (80, 53)
    conditioned = describe_conditioning(model.backbone.state_dict())
    assert conditioned == ("dict(type='identity', lam=10)" if 'spec' in name else 'None')


def change(content: dict, key: str, value: object, place: int = 0) -> None:
    content['annotations'][1]['segments_info'][place][key] = value


FAULTS = {
    'unknown category_id': lambda c: change(c, 'category_id', 99),
    'segments without pixels': lambda c: c['annotations'][1]['segments_info'].append(
        dict(c['annotations'][1]['segments_info'][0], id=77)
    ),
    'does not list': lambda c: c['annotations'][1]['segments_info'].pop(),
    'id that the image has already': lambda c: c['annotations'][1]['segments_info'].append(
        c['annotations'][1]['segments_info'][0]
    ),
    'from 1 to': lambda c: change(c, 'id', 0),
    'without an id': lambda c: c['annotations'][1]['segments_info'][0].pop('area'),
    'area of 0': lambda c: change(c, 'area', 0),
    'without an annotation': lambda c: c['annotations'].pop(),
    'several annotations': lambda c: c['annotations'].append(c['annotations'][0]),
    'unknown image_id': lambda c: c['annotations'].append(dict(c['annotations'][0], image_id=99)),
    'isthing': lambda c: c['categories'][0].pop('isthing'),
    'lacks 1 of': lambda c: c['annotations'][0].update(file_name='gone.png'),
    'segments_info': lambda c: c['annotations'][0].pop('segments_info'),
    'no category with': lambda c: [category.update(isthing=0) for category in c['categories']],
}


@pytest.mark.parametrize('message', FAULTS)
def test_faults_of_the_annotation_file(folder, tmp_path, message):
    root = tmp_path / 'data'
    shutil.copytree(folder, root)
    path = root / 'annotations' / 'panoptic_train.json'
    content = json.loads(path.read_text())
    FAULTS[message](content)
    path.write_text(json.dumps(content))
    cfg = load(root)
    with pytest.raises(InputError, match=message):
        find_task(cfg).adapt(cfg, ('train', 'val'), None, True, True)


@pytest.mark.parametrize(
    ('message', 'image'),
    [('size is not', np.zeros((50, 96, 3), np.uint8)), ('not RGB', np.zeros((96, 96), np.uint8)), ('decoded', None)],
)
def test_faults_of_the_pngs(folder, tmp_path, message, image):
    root = tmp_path / 'data'
    shutil.copytree(folder, root)
    content = b'no image' if image is None else cv2.imencode('.png', image)[1].tobytes()
    (root / 'annotations' / 'panoptic_train' / '000003.png').write_bytes(content)
    cfg = load(root)
    with pytest.raises(InputError, match=f'000003.*{message}|{message}.*000003'):
        find_task(cfg).adapt(cfg, ('train',), None, True, True)


def test_other_classes_folders_and_metrics_are_rejected(folder, tmp_path):
    cfg = load(folder)
    with pytest.raises(InputError, match='4 trained|1 trained'):
        find_task(cfg).adapt(cfg, ('val',), ['circle'], True, True)
    cfg.default_hooks.checkpoint.save_best = 'coco/segm_mAP'
    with pytest.raises(InputError, match='coco_panoptic/PQ'):
        find_task(cfg).adapt(cfg, ('train', 'val'), None, True, True)
    with pytest.raises(InputError, match='panoptic_train'):
        load(tmp_path)
    root = tmp_path / 'data'
    shutil.copytree(folder, root)
    shutil.rmtree(root / 'annotations' / 'panoptic_val')
    with pytest.raises(InputError, match=r'seg.*panoptic_val'):
        cfg = load(root)
        find_task(cfg).adapt(cfg, ('val',), None, True, True)
    assert encode_ids(np.array([[256]])).tolist() == [[[0, 1, 0]]] and Classes(['a']).things == 0
