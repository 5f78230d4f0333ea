"""Semantic segmentation: the metric, the layouts and faults of folders, and a run of the commands."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, in_processes, read_metrics, run_tool
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import Image

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.configs import read_config
from spec_mmdet.data import semantic
from spec_mmdet.data.findings import Findings
from spec_mmdet.data.shapes import write_split
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.semantic import SemanticMetric
from spec_mmdet.inference.inferencer import load_inferencer
from spec_mmdet.models.tta import use_augmentation

pytest.importorskip('mmseg', reason='MMSegmentation is not installed: pip install spec_mmdet[seg]')


@pytest.mark.parametrize('seed', range(5))
def test_metrics_are_mmsegmentations(seed):
    from mmseg.evaluation import IoUMetric

    rng = np.random.default_rng(seed)
    names = tuple('abcdefg')
    ours, theirs = SemanticMetric(), IoUMetric()
    ours.dataset_meta = theirs.dataset_meta = dict(classes=names)
    samples = []
    for i in range(4):
        truth = rng.integers(0, 5, (1, 20, 30))  # two classes never occur, one of them is predicted
        found = np.where(rng.random(truth.shape) < 0.5, truth.clip(max=6), rng.integers(0, 6, truth.shape))
        truth[rng.random(truth.shape) < 0.2] = 255
        maps = dict(gt_sem_seg=dict(data=torch.tensor(truth)), pred_sem_seg=dict(data=torch.tensor(found)))
        samples.append(dict(maps, img_path=f'{i}.png'))
    for metric in (ours, theirs):
        metric.process({}, samples)
    expected = theirs.compute_metrics(theirs.results)
    for name, value in ours.compute_metrics(ours.results).items():
        assert value == pytest.approx(expected[name], abs=0.006)  # rounded to two decimals
    assert ours.matrix.sum() == sum((s['gt_sem_seg']['data'] != 255).sum() for s in samples)


def test_many_classes_are_listed_in_the_log_only(caplog, tmp_path):
    metric, names = SemanticMetric(), [f'class {i}' for i in range(30)]
    metric.dataset_meta = dict(classes=names)
    labels = np.repeat(np.arange(28), 28)[None]  # the last two classes never occur
    found = np.where(np.arange(labels.size) % 28 < labels, labels, 29)  # of class i, i of 28 pixels are found
    maps = dict(gt_sem_seg=dict(data=torch.tensor(labels)), pred_sem_seg=dict(data=torch.tensor(found)))
    metric.process({}, [dict(maps, img_path='a')])
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        metric.compute_metrics(metric.results)
    finally:
        logger.removeHandler(caplog.handler)
    complete, shown = (record.getMessage().splitlines()[1:] for record in caplog.records[-2:])
    assert [line[:8].strip() for line in complete] == names
    assert shown[10].count('30') == 1 and len(shown) == 21
    assert [line.split()[1] for line in shown[:10]] == [str(i) for i in range(27, 17, -1)]
    assert {line.split()[1] for line in shown[11:]} == {'29', *map(str, range(9))}  # IoU of 29 is 0


@pytest.mark.parametrize(
    ('evaluator', 'expected'),
    [
        (dict(type='SemanticMetric'), 'semantic/mIoU'),
        (dict(type='mmdet.SemanticMetric', prefix='mine'), 'mine/mIoU'),
        (dict(type='IoUMetric', iou_metrics=['mIoU']), 'mIoU'),
        ([dict(type='mmseg.IoUMetric', iou_metrics=['mDice', 'mIoU'], prefix='x')], 'x/mIoU'),
        (dict(type='IoUMetric', iou_metrics=['mDice']), None),
        (dict(type='CityscapesMetric'), None),
    ],
    ids=str,
)
def test_the_best_metric(evaluator, expected):
    assert semantic.find_best_metric(Config(dict(val_evaluator=evaluator))) == expected


def write_pair(folder, image: str, label: str, labels: np.ndarray, mode: str | None = None, size=(40, 50)) -> None:
    for name in (image, label):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / image)
    picture = Image.fromarray(labels)
    if mode == 'P':
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(folder / label)


LAYOUTS = {
    'own': ('images/{0}/a.jpg', 'labels/{0}/a.png', ('train', 'val')),
    'ade20k': ('images/{0}/a.jpg', 'annotations/{0}/a.png', ('training', 'validation')),
    'cityscapes': (
        'leftImg8bit/{0}/bonn/a_leftImg8bit.png',
        'gtFine/{0}/bonn/a_gtFine_labelTrainIds.png',
        ('train', 'val'),
    ),
    'voc': ('JPEGImages/{0}.jpg', 'SegmentationClass/{0}.png', ('train', 'val')),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(tmp_path, layout):
    image, label, splits = LAYOUTS[layout]
    labels = np.arange(40 * 50, dtype=np.uint8).reshape(40, 50) % 3
    for split, name in zip(('train', 'val'), splits):
        write_pair(tmp_path, image.format(name), label.format(name), labels, 'P' if layout == 'voc' else None)
        if layout == 'voc':
            (tmp_path / 'ImageSets' / 'Segmentation').mkdir(parents=True, exist_ok=True)
            (tmp_path / 'ImageSets' / 'Segmentation' / f'{split}.txt').write_text(f'{name}\n')
    for split in ('train', 'val'):
        dataset = dict(type='ADE20KDataset', pipeline=[dict(type='LoadAnnotations', reduce_zero_label=True)])
        semantic.use_split(dataset, (), tmp_path, split)
        assert semantic.reads(dataset)
        ((image_path, label_path),), from_one = semantic.open_dataset(dataset)
        assert image_path.is_file() and label_path.is_file() and from_one == (layout in ('own', 'ade20k'))
        number = dict(cityscapes=19, voc=21).get(layout, 150)
        assert len(semantic.find_dataset(dataset).METAINFO['classes']) == number
        found = Findings()
        (checked,) = semantic.check_split([(image_path, label_path)], ['x'] * number, split, found, from_one=from_one)
        assert not found.errors and np.array_equal(checked[1], np.where(from_one, labels - np.uint8(1), labels))

    (tmp_path / 'classes.txt').write_text('sky\nold house\nroad\n')
    semantic.use_split(dataset, (), tmp_path, 'val')
    assert list(dataset['metainfo']['classes']) == ['sky', 'old house', 'road']
    assert not semantic.open_dataset(dataset)[1]  # labels count from 0


def test_classes_with_colours(tmp_path):
    (tmp_path / 'labelmap.txt').write_text('# label:color_rgb:parts:actions\nbackground:0,0,0::\nred car:250,50,83::\n')
    assert semantic.read_classes(tmp_path) == (['background', 'red car'], [[0, 0, 0], [250, 50, 83]])
    (tmp_path / 'classes.txt').write_text('background 0 0 0\nred car 250 50 83\n')
    assert semantic.read_classes(tmp_path) == (['background', 'red car'], [[0, 0, 0], [250, 50, 83]])
    (tmp_path / 'classes.txt').write_text('a\na\n')
    with pytest.raises(InputError, match='1 different'):
        semantic.read_classes(tmp_path)


GOOD = np.zeros((40, 50), np.uint8)
FAULTS = {
    'without a label PNG': None,
    'size is not that': GOOD[:30],
    'label 3': np.where(np.arange(50) < 5, 3, GOOD).astype(np.uint8),
    'RGB': np.zeros((40, 50, 3), np.uint8),
    '16 bits': np.zeros((40, 50), np.uint16),
}


@pytest.mark.parametrize('says', FAULTS)
def test_faults_are_one_line(tmp_path, says, monkeypatch):
    for split in ('train', 'val'):
        write_pair(tmp_path, f'images/{split}/a.jpg', f'labels/{split}/a.png', GOOD)
    (tmp_path / 'classes.txt').write_text('sky\nhouse\nroad\n')
    faulty = GOOD if FAULTS[says] is None else FAULTS[says]
    write_pair(tmp_path, 'images/train/b.jpg', 'labels/train/b.png', faulty)
    if FAULTS[says] is None:
        (tmp_path / 'labels/train/b.png').unlink()
    arguments = ['xcit_spec_shapes_semanticfpn', '--data', tmp_path, '--work-dir', tmp_path / 'work']
    assert says in error_line(monkeypatch, 'train', *arguments)
    assert says in error_line(monkeypatch, 'prepare', tmp_path, '--findings', tmp_path / 'f.csv')


def test_warnings(tmp_path):
    write_pair(tmp_path, 'images/train/a.jpg', 'labels/train/a.png', GOOD + np.uint8(255))
    found, pair = Findings(), (tmp_path / 'images/train/a.jpg', tmp_path / 'labels/train/a.png')
    assert list(semantic.check_split([pair], ['sky', 'road'], 'train', found, from_one=False))
    assert not found.errors
    assert {kind: len(places) for kind, places in found.warnings.items()} == {
        'label PNGs in which every pixel is ignored': 1,
        'classes without a pixel': 2,
    }


def test_prepare_converts_colours(tmp_path, monkeypatch, capsys):
    colours = np.zeros((40, 50, 3), np.uint8)
    colours[:, 10:] = 250, 50, 83
    for split in ('train', 'val'):
        write_pair(tmp_path / 'in', f'images/{split}/a.jpg', f'masks/{split}/a.png', colours)
    write_pair(tmp_path / 'in', 'images/train/b.jpg', 'masks/train/b.png', colours + np.uint8(1))
    (tmp_path / 'in' / 'classes.txt').write_text('sky 0 0 0\nred car 250 50 83\n')
    options = ['--out', tmp_path / 'out', '--findings', tmp_path / 'f.csv']
    assert 'no class has' in error_line(monkeypatch, 'prepare', tmp_path / 'in', *options)
    assert not (tmp_path / 'out').exists()
    run_tool(monkeypatch, 'prepare', tmp_path / 'in', '--drop', *options)
    assert 'train: 1 images' in capsys.readouterr().out and 'b.png' in (tmp_path / 'f.csv').read_text()
    assert {path.relative_to(tmp_path / 'out').as_posix() for path in (tmp_path / 'out').rglob('*.*')} == {
        'classes.txt',
        *(f'{part}/{split}/a.{suffix}' for part, suffix in (('images', 'jpg'), ('labels', 'png')) for split in
          ('train', 'val')),
    }  # fmt: skip
    with Image.open(tmp_path / 'out' / 'labels' / 'val' / 'a.png') as image:
        assert np.array_equal(image, np.arange(50) >= 10 + GOOD)


def test_labels_of_the_demo_are_its_polygons(tmp_path):
    from pycocotools.coco import COCO

    write_split(tmp_path, 'val', 12, 96, np.random.default_rng(1), labelled=True)
    coco = COCO(str(tmp_path / 'annotations' / 'instances_val.json'))
    assert semantic.read_classes(tmp_path)[0] == ['background', 'circle', 'square', 'triangle', 'star']
    for image in coco.imgs.values():
        with Image.open(tmp_path / 'labels' / 'val' / image['file_name']) as file:
            labels = np.asarray(file)
        covered = np.zeros_like(labels, bool)
        for annotation in coco.imgToAnns[image['id']]:
            mask = coco.annToMask(annotation).astype(bool)
            covered |= mask
            expected = 255 if annotation['iscrowd'] else annotation['category_id']
            assert (labels[mask] == expected).mean() > 0.9  # polygons of neighbours share pixels of their edge
        assert not labels[~covered].any()


CONFIG = 'xcit_spec_shapes_semanticfpn'
SMALL = ['model.backbone.arch.dim=32', 'model.backbone.arch.depth=4', 'model.neck.in_channels=[32,32,32,32]']


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory) -> Path:
    """A folder with data/, and work/ of a training of two iterations."""
    root = tmp_path_factory.mktemp('semantic')
    for split, images in (('train', 4), ('val', 3)):
        write_split(root / 'data', split, images, 64, np.random.default_rng(len(split)), labelled=True)
    short = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=1']
    arguments = ['--data', root / 'data', '--work-dir', root / 'work', '--batch-size', '2', '--auto-scale-lr']
    with pytest.MonkeyPatch.context() as patch:
        run_tool(patch, 'train', CONFIG, *arguments, '--cfg-options', *SMALL, *short)
    return root


def test_train_test_and_predict(segmentor, tmp_path, monkeypatch, capsys):
    data, work = segmentor / 'data', segmentor / 'work'
    run_tool(monkeypatch, 'prepare', data, '--findings', tmp_path / 'findings.csv')  # as boxes and masks
    assert 'not used' not in capsys.readouterr().out
    assert {'iter_2.pth', 'results.csv', 'results.png', 'run.json', 'best_semantic_mIoU_iter_2.pth'} <= {
        path.name for path in work.iterdir()
    }
    assert 'semantic/mIoU' in (work / 'results.csv').read_text()
    config, checkpoint = work / f'{CONFIG}.py', work / 'iter_2.pth'
    exported = tmp_path / 'model.onnx'
    run_tool(monkeypatch, 'export', config, checkpoint, exported, '--images', data / 'val')
    told = capsys.readouterr().out
    assert min(map(float, re.findall(r'([\d.]+) %', told))) > 99.9 and len(re.findall(' %', told)) == 5

    # The metrics of the predictions, whose PNGs predict writes, are those of test, also with a sliding window.
    for name, (weights, options) in {
        'whole': (checkpoint, []),
        'exported': (exported, []),
        'slide': (
            checkpoint,
            ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=48,48', 'model.test_cfg.stride=32,32'],
        ),
    }.items():
        options = ['--cfg-options', *options] if options else []
        report = tmp_path / f'report {name}'
        run_tool(monkeypatch, 'test', config, weights, '--data', data, '--report', report, '--work-dir',
                 tmp_path / 'test', *options)  # fmt: skip
        told = capsys.readouterr().out
        run_tool(monkeypatch, 'predict', config, weights, data / 'val', '--out', tmp_path / name, *options)
        results = json.loads((tmp_path / name / 'predictions.json').read_text())
        matrix = np.zeros((5, 5), int)
        for result in results:
            with Image.open(tmp_path / name / result['file_name']) as file:
                found = np.asarray(file)
            with Image.open(data / result['file_name'].replace('labels/', 'labels/val/')) as file:
                truth = np.asarray(file)
            assert sum(segment['area'] for segment in result['segments']) == found.size
            np.add.at(matrix, (truth[truth < 255], found[truth < 255]), 1)
        accuracy = 100 * np.trace(matrix) / matrix.sum()
        assert f'semantic/aAcc {float(f"{accuracy:.4g}"):g}' in told
        page = (report / 'index.html').read_text()
        assert f'{accuracy:.1f}</b>aAcc' in page and 'lowest mIoU' in page
        assert len(list((report / 'labels').iterdir())) == len(results) == 3


def test_two_processes_equal_one(segmentor, tmp_path, monkeypatch):
    """Three images, of which a process gets two and the other one and a copy; and steps from two images."""
    data, work = segmentor / 'data', segmentor / 'work'
    test = ['test', work / f'{CONFIG}.py', work / 'iter_2.pth', '--data', data]
    one, two, settings = tmp_path / 'one', tmp_path / 'two', ['test_dataloader.batch_size=1']
    run_tool(monkeypatch, *test, '--work-dir', one / 'test', '--cfg-options', *settings)
    in_processes(2, two, lambda: run_tool(monkeypatch, *test, '--work-dir', two / 'test', '--report', two / 'report',
                                          '--launcher', 'pytorch', '--cfg-options', *settings))  # fmt: skip
    ours, theirs = (read_metrics(folder / 'test') for folder in (one, two))
    for name in ('mIoU', 'mAcc', 'aAcc'):
        assert ours[f'semantic/{name}'] == theirs[f'semantic/{name}'] > 0
    assert len([*(two / 'report' / 'labels').iterdir()]) == 3 and (two / 'report' / 'index.html').is_file()

    def train(work: Path, processes: int, *options: str) -> None:
        settings = [*SMALL, f'train_cfg.max_iters={4 // processes}', 'default_hooks.checkpoint.interval=1']
        settings += ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None', 'param_scheduler=None']
        run_tool(monkeypatch, 'train', CONFIG, '--data', data, '--work-dir', work, '--batch-size', 1, *options,
                 '--cfg-options', *settings, f'optim_wrapper.accumulative_counts={2 // processes}')  # fmt: skip

    train(one / 'train', 1)
    in_processes(2, two / 'meet', lambda: train(two / 'train', 2, '--launcher', 'pytorch'))
    weights = [load(path)['state_dict'] for path in (one / 'train' / 'iter_4.pth', two / 'train' / 'iter_2.pth')]
    for name, value in weights[0].items():
        if 'running_' not in name and 'num_batches' not in name:  # batches of another size
            torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)


def test_augmentation_averages_views(segmentor, tmp_path, monkeypatch):
    """Compare with the mean of the probabilities of six sizes, each also mirrored."""
    work = segmentor / 'work'
    arguments = work / f'{CONFIG}.py', work / 'iter_2.pth'
    run_tool(monkeypatch, 'test', *arguments, '--data', segmentor / 'data', '--tta', '--work-dir', tmp_path / 'test')
    reported = read_metrics(tmp_path / 'test')['semantic/aAcc']
    model = load_inferencer(read_config(arguments[0]), str(arguments[1]), 'cpu').model
    mean, std = (model.data_preprocessor.get_buffer(name) for name in ('mean', 'std'))
    right = counted = 0
    for path in sorted((segmentor / 'data' / 'val').iterdir()):
        image = cv2.imread(str(path))[..., ::-1]
        total = 0
        for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
            view = cv2.resize(image, None, fx=ratio, fy=ratio).astype(np.float32)
            view = ((torch.from_numpy(view).permute(2, 0, 1) - mean) / std)[None]
            for flip in (False, True):
                with torch.no_grad():
                    logits = model.encode_decode(view.flip(3) if flip else view, [dict(img_shape=view.shape[2:])])
                logits = logits.flip(3) if flip else logits
                total = total + F.interpolate(logits, size=image.shape[:2], mode='bilinear').softmax(1)
        with Image.open(segmentor / 'data' / 'labels' / 'val' / path.name) as file:
            truth = torch.from_numpy(np.array(file))
        right += (total[0].argmax(0) == truth)[truth < 255].sum().item()
        counted += (truth < 255).sum().item()
    assert reported == pytest.approx(100 * right / counted, abs=0.1)


def test_a_resumed_training_is_the_same(segmentor, tmp_path, monkeypatch):
    work = tmp_path / 'work'
    shutil.copytree(segmentor / 'work', work, ignore=shutil.ignore_patterns('iter_2.pth', '*.py'))
    arguments = ['--data', segmentor / 'data', '--work-dir', work, '--resume']
    run_tool(monkeypatch, 'train', segmentor / 'work' / f'{CONFIG}.py', *arguments)
    one, other = (load(folder / 'iter_2.pth')['state_dict'] for folder in (segmentor / 'work', work))
    for name, value in one.items():
        assert torch.equal(value, other[name])


LOAD = """
import sys
from mmseg.apis import MMSegInferencer, inference_model, init_model
assert 'spec_mmdet.registered' not in sys.modules
model = init_model('config.py', 'model.pth', device='cpu')
inferencer = MMSegInferencer('config.py', 'model.pth', device='cpu')
a, b = inference_model(model, sys.argv[1]), inferencer(sys.argv[1], return_datasamples=True)
assert (a.pred_sem_seg.data == b.pred_sem_seg.data).all()
print(type(model.backbone).__name__, *model.dataset_meta['classes'], a.pred_sem_seg.data.sum().item())
"""


def test_mmsegmentation_loads_a_published_segmentor(segmentor, tmp_path, monkeypatch):
    out = tmp_path / 'published'
    run_tool(monkeypatch, 'publish', segmentor / 'work' / 'iter_2.pth', '--out', out)
    assert 'semantic/mIoU |' in (out / 'README.md').read_text()
    image = segmentor / 'data' / 'val' / '000001.png'
    done = subprocess.run([sys.executable, '-c', LOAD, image], cwd=out, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    predict = ['predict', out / 'config.py', out / 'model.safetensors', image, '--out', tmp_path / 'predicted']
    run_tool(monkeypatch, *predict)
    with Image.open(tmp_path / 'predicted' / 'labels' / '000001.png') as file:
        assert f'SpecXCiT background circle square triangle star {np.asarray(file).sum()}' in done.stdout
    run_tool(monkeypatch, 'test', out / 'config.py', out / 'model.pth', '--data', segmentor / 'data', '--show-dir',
             tmp_path / 'shown', '--work-dir', tmp_path / 'test')  # fmt: skip
    assert len([*(tmp_path / 'shown').iterdir()]) == 3


def test_what_is_rejected(segmentor, tmp_path, monkeypatch):
    train = ['train', CONFIG, '--data', segmentor / 'data', '--work-dir', tmp_path / 'work']
    assert '--preset finetune' in error_line(monkeypatch, *train, '--preset', 'finetune')
    assert '--epochs' in error_line(monkeypatch, *train, '--epochs', 2)
    monitored = ['--cfg-options', 'default_hooks.checkpoint.save_best=coco/mIoU']
    assert 'coco/mIoU' in (said := error_line(monkeypatch, *train, *monitored)) and 'semantic/mIoU' in said
    with pytest.raises(InputError, match='SegTTAModel'):
        use_augmentation(Config(dict(default_scope='mmseg', model={}, tta_model=dict(type='MaskTTAModel'))), False)
    test = ['test', segmentor / 'work' / f'{CONFIG}.py', segmentor / 'work' / 'iter_2.pth', '--work-dir', tmp_path]
    run = tmp_path / 'run'
    shutil.copytree(segmentor / 'work', run)
    run_tool(monkeypatch, *test, '--report', run / 'report')
    assert 'no detections' in error_line(monkeypatch, 'compare', f'a={run}', f'b={run}', '--out', tmp_path / 'out')
