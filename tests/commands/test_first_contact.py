"""Run prepare, train, test and predict on a user's own data, without editing a file."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, error_line, run_tool

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.data import shapes

CLASSES = ['circle', 'square', 'triangle', 'star']
SMALL = """
_base_ = ['spec_mmdet::_base_/mask-rcnn_xcit_cpu.py', 'spec_mmdet::_base_/coco_3x.py']
model = dict(
    backbone=dict(arch=dict(dim=16, depth=4, num_heads=2)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rpn=dict(max_per_img=10), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
train_dataloader = dict(num_workers=0)
val_dataloader = dict(num_workers=0)
test_dataloader = val_dataloader
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(vis_backends=vis_backends)
default_hooks = dict(conditioning=None, results=None)
"""
BOXES = SMALL.replace('model = dict(', "model = dict(type='FasterRCNN', roi_head=dict(mask_head=None),", 1)


@pytest.fixture(scope='module')
def configs(tmp_path_factory) -> Path:
    """Write two minimal detectors as user configs: their lines set neither data nor classes nor masks."""
    folder = tmp_path_factory.mktemp('configs')
    (folder / 'mask.py').write_text(SMALL)
    (folder / 'boxes.py').write_text(BOXES)
    return folder


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> tuple[Path, dict]:
    """Make ten images and the COCO dict of their objects, without crowds and fields that only COCO has."""
    root = tmp_path_factory.mktemp('source')
    shapes.write_split(root, 'train', 10, 64, np.random.default_rng(0))
    coco = json.loads((root / 'annotations/instances_train.json').read_text())
    annotations = [a for a in coco['annotations'] if not a['iscrowd']]
    for annotation in annotations:
        del annotation['area'], annotation['iscrowd']
    return root / 'train', {**coco, 'annotations': annotations}


def part(coco: dict, first: int, last: int) -> dict:
    images = coco['images'][first:last]
    ids = {image['id'] for image in images}
    return {**coco, 'images': images, 'annotations': [a for a in coco['annotations'] if a['image_id'] in ids]}


def without_masks(coco: dict) -> dict:
    return {**coco, 'annotations': [{**a, 'segmentation': []} for a in coco['annotations']]}


def copy(images: Path, names: list[dict], to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for image in names:
        shutil.copy(images / image['file_name'], to)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def roboflow(source, root: Path) -> None:
    images, coco = source
    for name, range_ in dict(train=(0, 8), valid=(8, 10)).items():
        some = part(coco, *range_)
        copy(images, some['images'], root / name)
        placeholder = dict(id=0, name='shapes', supercategory='none')
        categories = [placeholder, *(dict(category, supercategory='shapes') for category in some['categories'])]
        write(root / name / '_annotations.coco.json', {**some, 'categories': categories})


def cvat(source, root: Path) -> None:
    copy(source[0], source[1]['images'], root / 'images' / 'default')
    write(root / 'annotations' / 'instances_default.json', source[1])


def label_studio(source, root: Path) -> None:
    """Return the file as the server writes it on Windows: with the upload folder in the names."""
    copy(source[0], source[1]['images'], root / 'images')
    images = [dict(image, file_name=f'images\\{image["file_name"]}') for image in source[1]['images']]
    write(root / 'result.json', {**source[1], 'images': images})


def boxes_alone(source, root: Path) -> None:
    images, coco = source
    for name, range_ in dict(train=(0, 8), val=(8, 10)).items():
        some = without_masks(part(coco, *range_))
        copy(images, some['images'], root / name)
        write(root / 'annotations' / f'instances_{name}.json', some)


def yolo_boxes(source, root: Path) -> None:
    images, coco = source
    copy(images, coco['images'], root / 'train' / 'images')
    for image in coco['images']:
        lines = []
        for a in (a for a in coco['annotations'] if a['image_id'] == image['id']):
            x, y, w, h = a['bbox']
            lines.append(f'{a["category_id"] - 1} {(x + w / 2) / 64} {(y + h / 2) / 64} {w / 64} {h / 64}')
        path = root / 'train' / 'labels' / f'{Path(image["file_name"]).stem}.txt'
        path.parent.mkdir(exist_ok=True)
        path.write_text('\n'.join(lines))
    (root / 'data.yaml').write_text(yaml.safe_dump(dict(train='../train/images', nc=4, names=CLASSES)))


def voc(source, root: Path) -> None:
    images, coco = source
    copy(images, coco['images'], root / 'JPEGImages')
    (root / 'Annotations').mkdir()
    for image in coco['images']:
        text = '<annotation>'
        for a in (a for a in coco['annotations'] if a['image_id'] == image['id']):
            x, y, w, h = a['bbox']
            text += f'<object><name>{CLASSES[a["category_id"] - 1]}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>'
            text += f'<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>'
        (root / 'Annotations' / f'{Path(image["file_name"]).stem}.xml').write_text(text + '</annotation>')


@pytest.mark.parametrize(
    ('make', 'config', 'split'),
    [
        (roboflow, 'mask', False),
        (cvat, 'mask', True),
        (label_studio, 'mask', True),
        (yolo_boxes, 'boxes', True),
        (voc, 'boxes', True),
        (boxes_alone, 'boxes', False),
    ],
    ids=lambda value: getattr(value, '__name__', None),
)
def test_four_commands(monkeypatch, source, configs, tmp_path, capsys, make, config, split):
    make(source, tmp_path / 'export')
    monkeypatch.chdir(tmp_path)
    data = Path('data' if split else 'export')
    run_tool(monkeypatch, 'prepare', 'export', *(['--val', 0.2, '--out', data] if split else []))
    assert f'ready for training: spec-mmdet train CONFIG --data {data}' in capsys.readouterr().out
    if make in (label_studio, voc):
        return  # written as those of the other formats that are converted

    small = ['--epochs', 1, '--batch-size', 4, '--image-size', 64]
    run_tool(monkeypatch, 'train', configs / f'{config}.py', '--data', data, '--work-dir', 'work', *small)
    checkpoint = load('work/epoch_1.pth')
    assert set(checkpoint['meta']['dataset_meta']['classes']) == set(CLASSES) and checkpoint['meta']['iter'] == 2
    run_tool(monkeypatch, 'test', f'work/{config}.py', 'work/epoch_1.pth', '--work-dir', 'test')
    (reported,) = (json.loads(path.read_text()) for path in Path('test').glob('*/*.json'))
    assert reported['coco/bbox_mAP'] >= 0 and ('coco/segm_mAP' in reported) == (config == 'mask')

    folder = next(path for name in ('val', 'valid') if (path := data / name).is_dir())
    run_tool(monkeypatch, 'predict', f'work/{config}.py', 'work/epoch_1.pth', folder, '--out', 'found', '--score', 0)
    assert len([*Path('found').rglob('*.png')]) == 2
    results = json.loads(Path('found/predictions.json').read_text())
    assert results and all(('segmentation' in result) == (config == 'mask') for result in results)


def test_early_stopping_as_it_is_documented(monkeypatch, source, configs, tmp_path, capsys):
    page = (ROOT / 'docs' / 'guide' / 'train.md').read_text()
    (documented,) = re.findall('`(default_hooks.stop.type=.+?)`', page)
    roboflow(source, tmp_path / 'export')
    monkeypatch.chdir(tmp_path)
    small = ['--data', 'export', '--work-dir', 'work', '--epochs', 6, '--batch-size', 8, '--image-size', 64]
    soon = ['default_hooks.stop.patience=2', 'default_hooks.stop.min_delta=1']
    run_tool(monkeypatch, 'train', configs / 'mask.py', *small, '--cfg-options', *documented.split(), *soon)
    printed = capsys.readouterr().out
    assert 'last 2 records' in printed and 'epoch 3 of 6' in printed
    assert load('work/epoch_3.pth')['meta']['epoch'] == 3 and not Path('work/epoch_4.pth').exists()


def test_boxes_without_masks_are_rejected_for_mask_rcnn(monkeypatch, source, configs, tmp_path):
    boxes_alone(source, tmp_path / 'export')
    args = [configs / 'mask.py', '--data', tmp_path / 'export', '--work-dir', tmp_path / 'work']
    says = error_line(monkeypatch, 'train', *args)
    assert 'no masks' in says and 'xcit_fasterrcnn' in says
    assert not (tmp_path / 'work').exists()


def test_classes_are_stated_once(monkeypatch, source, configs, tmp_path):
    """Classes are set by metainfo, of one data set or all; heads with another number are named, with the place."""
    roboflow(source, tmp_path / 'export')
    monkeypatch.chdir(tmp_path)
    stated = "('circle', 'square')"
    dataset = f'dict(dataset=dict(metainfo=dict(classes={stated})))'
    own = configs / 'own.py'
    head = 'roi_head=dict(bbox_head=dict(num_classes=3))'
    lines = f"_base_ = 'mask.py'\ntrain_dataloader = {dataset}\n"
    train = ['--data', 'export', '--work-dir', 'work', '--epochs', 1, '--batch-size', 4, '--image-size', 64]

    own.write_text(f'{lines}model = dict({head})\n')
    says = error_line(monkeypatch, 'train', own, *train)
    assert 'model.roi_head.bbox_head.num_classes is 3' in says and 'metainfo.classes' in says
    own.write_text(f'{lines}val_dataloader = {dataset.replace("square", "star")}\n')
    says = error_line(monkeypatch, 'train', own, *train)
    assert 'val_dataloader.dataset.metainfo.classes is (circle, star)' in says and 'train_dataloader.dataset' in says

    own.write_text(lines)
    run_tool(monkeypatch, 'train', own, *train)
    checkpoint = load('work/epoch_1.pth')
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == ('circle', 'square')
    assert checkpoint['state_dict']['roi_head.bbox_head.fc_cls.weight'].shape[0] == 3
    (scalars,) = Path('work').glob('*/vis_data/scalars.json')
    assert any('coco/segm_mAP' in json.loads(line) for line in scalars.read_text().splitlines())


@pytest.mark.parametrize(('classes', 'number'), [("('circle')", 1), ("'two.txt'", 2)])
def test_classes_as_one_name_or_a_file_of_names(monkeypatch, source, configs, tmp_path, classes, number):
    roboflow(source, tmp_path / 'export')
    monkeypatch.chdir(tmp_path)
    Path('two.txt').write_text('circle\nsquare\n')
    own = configs / 'one.py'
    own.write_text(f"_base_ = 'mask.py'\ntrain_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))\n")
    small = ['--epochs', 1, '--batch-size', 8, '--image-size', 64]
    run_tool(monkeypatch, 'train', own, '--data', 'export', '--work-dir', 'work', *small)
    assert len(load('work/epoch_1.pth')['meta']['dataset_meta']['classes']) == number


def test_evaluator_and_data_set_must_use_the_same_annotation_file(monkeypatch, source, configs, tmp_path):
    roboflow(source, tmp_path / 'export')
    other = tmp_path / 'export/train/_annotations.coco.json'
    setting = ['--cfg-options', f'val_evaluator.ann_file={other}']
    says = error_line(monkeypatch, 'train', configs / 'mask.py', '--data', tmp_path / 'export', *setting)
    assert f'val_evaluator.ann_file is {other} and val_dataloader.dataset.ann_file is ' in says


def test_metainfo_in_the_old_spelling_is_an_error(monkeypatch, source, configs, tmp_path):
    roboflow(source, tmp_path / 'export')
    lines = "_base_ = 'mask.py'\ntrain_dataloader = dict(dataset=dict(metainfo=dict(CLASSES=('circle',))))\n"
    (configs / 'before.py').write_text(lines)
    says = error_line(monkeypatch, 'train', configs / 'before.py', '--data', tmp_path / 'export')
    assert 'train_dataloader.dataset.metainfo.CLASSES' in says


def test_several_annotation_files_of_a_data_set_are_an_error(monkeypatch, source, configs, tmp_path):
    roboflow(source, tmp_path / 'export')
    lines = "_base_ = 'mask.py'\ntrain_dataloader = dict(dataset=dict(ann_file=['a.json', 'b.json']))\n"
    (configs / 'several.py').write_text(lines)
    assert 'ConcatDataset' in error_line(monkeypatch, 'train', configs / 'several.py')
