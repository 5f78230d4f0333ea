"""The command line tools, in process: training, testing, resuming, and what they say of unusable inputs."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.checkpoint import load

CONFIG = ROOT / 'configs' / 'xcit_spec_shapes.py'
FEW = ['train_dataloader.dataset.indices=8']  # two steps of four images
DDP_ON_CPU = ['model_wrapper_cfg.type=MMDistributedDataParallel', 'model_wrapper_cfg.device_ids=None']


def options(root: Path) -> list[str]:
    """Arguments that point the shapes config at a data set and make it small."""
    settings = {'train_dataloader.batch_size': 4, 'train_cfg.max_epochs': 1, 'param_scheduler.0.end': 5}
    for loop in ('train', 'val', 'test'):
        settings[f'{loop}_dataloader.dataset.data_root'] = f'{root}/'
        if loop != 'train':
            settings[f'{loop}_evaluator.ann_file'] = root / 'annotations' / 'instances_val.json'
    return ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]


def run_tool(monkeypatch, name: str, *args) -> None:
    """Run a tool as its command does, in this process."""
    monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, args)])
    runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')


def complaint(monkeypatch, name: str, *args) -> str:
    """The one line with which a tool refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, name, *args)
    message = str(stopped.value.code)
    assert message.startswith('error: ') and '\n' not in message
    return message


@pytest.fixture(scope='module')
def shapes(tmp_path_factory, make_shapes) -> Path:
    root = tmp_path_factory.mktemp('shapes')
    for split, images in dict(train=160, val=12).items():
        make_shapes.write_split(root, split, images, 128, np.random.default_rng(len(split)))
    return root


@pytest.fixture(scope='module')
def trained(tmp_path_factory, shapes) -> Path:
    """The work directory of one epoch: forty steps, by the command itself, from another folder than the repository's.

    Enough for an AP that is small, but not zero.
    """
    work = tmp_path_factory.mktemp('work')
    command = [sys.executable, ROOT / 'tools' / 'train.py', CONFIG, '--work-dir', work, *options(shapes)]
    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    return work


def test_reported_ap_is_pycocotools_own(monkeypatch, shapes, trained, tmp_path):
    out = tmp_path / 'results.pkl'
    monkeypatch.chdir(tmp_path)
    args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', 'work', '--out', out, '--show-dir', 'pictures']
    run_tool(monkeypatch, 'test', *args, *options(shapes))
    (reported,) = (json.loads(path.read_text()) for path in (tmp_path / 'work').glob('*/*.json'))
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 12

    coco = COCO(str(shapes / 'annotations' / 'instances_val.json'))
    boxes, masks = [], []
    for result in pickle.loads(out.read_bytes()):
        found = result['pred_instances']
        for (x0, y0, x1, y1), score, label, rle in zip(*(found[k] for k in ('bboxes', 'scores', 'labels', 'masks'))):
            entry = dict(image_id=result['img_id'], category_id=int(label) + 1, score=float(score))
            boxes.append(dict(entry, bbox=[float(v) for v in (x0, y0, x1 - x0, y1 - y0)]))
            masks.append(dict(entry, segmentation=rle))
    for kind, results in (('bbox', boxes), ('segm', masks)):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        for name, value in zip(('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'), evaluation.stats):
            assert reported[f'coco/{kind}_{name}'] == round(float(value), 3), (kind, name)
    assert evaluation.stats[1] > 0


def test_resuming_goes_on_where_training_stopped(monkeypatch, shapes, trained, tmp_path):
    two_epochs = [*options(shapes), 'train_cfg.max_epochs=2', *FEW]
    run_tool(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, '--resume', trained / 'epoch_1.pth', *two_epochs)
    before, after = (load(p) for p in (trained / 'epoch_1.pth', tmp_path / 'epoch_2.pth'))
    assert (before['meta']['iter'], after['meta']['iter']) == (40, 42)
    steps = {state['step'].item() for state in after['optimizer']['state'].values()}
    assert steps == {42}
    for key, value in before['state_dict'].items():
        if 'correction' in key:
            assert torch.equal(value, after['state_dict'][key])
    assert not torch.equal(
        before['state_dict']['neck.fpn_convs.0.conv.weight'], after['state_dict']['neck.fpn_convs.0.conv.weight']
    )


def test_tta(monkeypatch, shapes, trained, tmp_path):
    run_tool(monkeypatch, 'test', CONFIG, trained / 'epoch_1.pth', '--tta', '--work-dir', tmp_path, *options(shapes))
    (reported,) = (json.loads(path.read_text()) for path in tmp_path.glob('*/*.json'))
    assert reported['coco/segm_mAP_50'] > 0


def test_several_processes(shapes, tmp_path):
    # MMEngine selects a CUDA device in every process; on a machine without one that alone has to be left out.
    (tmp_path / 'sitecustomize.py').write_text('import torch\ntorch.cuda.set_device = lambda device: None\n')
    env = dict(os.environ, PYTHONPATH=str(tmp_path), PYTHON=sys.executable, OMP_NUM_THREADS='1', PORT='29567')
    env['CUDA_VISIBLE_DEVICES'] = ''
    work = tmp_path / 'work'
    on_cpu = ['env_cfg.dist_cfg.backend=gloo', *DDP_ON_CPU]
    train = [ROOT / 'tools' / 'dist_train.sh', CONFIG, '2', '--work-dir', work, *options(shapes), *on_cpu, *FEW]
    subprocess.run(train, check=True, env=env, stdout=subprocess.DEVNULL)
    assert load(work / 'epoch_1.pth')['meta']['iter'] == 1  # eight images, two processes, four images each

    test = [ROOT / 'tools' / 'dist_test.sh', CONFIG, work / 'epoch_1.pth', '2', '--work-dir', work / 'test']
    subprocess.run([*test, *options(shapes), *on_cpu], check=True, env=env, stdout=subprocess.DEVNULL)
    # As text: MMEngine lets every process write this file, so that it can end in a remnant of another's.
    (reported,) = (path.read_text() for path in (work / 'test').glob('*/*.json'))
    assert '"coco/segm_mAP"' in reported


@pytest.fixture
def broken_shapes(shapes, tmp_path):
    """A copy of the data set that a test may spoil."""
    subprocess.run(['cp', '-r', shapes, tmp_path / 'broken'], check=True)
    return tmp_path / 'broken'


def spoil_json(edit, split='train'):
    def spoil(root):
        path = root / 'annotations' / f'instances_{split}.json'
        coco = json.loads(path.read_text())
        edit(coco)
        path.write_text(json.dumps(coco))

    return spoil


@pytest.mark.parametrize(
    ('spoil', 'says'),
    [
        (lambda root: (root / 'annotations/instances_train.json').unlink(), 'instances_train.json: no such file'),
        (lambda root: (root / 'annotations/instances_val.json').unlink(), 'instances_val.json: no such file'),
        (lambda root: (root / 'annotations/instances_train.json').write_text('<html>'), 'not JSON'),
        (lambda root: (root / 'annotations/instances_train.json').write_text('[1]'), 'no list of "images"'),
        (spoil_json(lambda coco: coco.pop('annotations')), 'no list of "annotations"'),
        (spoil_json(lambda coco: coco['annotations'][0].pop('bbox')), 'one of its "annotations" has no bbox'),
        (spoil_json(lambda coco: coco['images'].clear()), 'lists no images'),
        (spoil_json(lambda coco: coco['categories'].reverse()), 'in the same order'),
        (spoil_json(lambda coco: coco['categories'][0].update(name='ring')), 'do not contain the classes'),
        (lambda root: (root / 'train').rename(root / 'elsewhere'), 'train: no such folder'),
        (lambda root: (root / 'train/000003.png').unlink(), 'lacks 1 of the 160 images, first 000003.png'),
    ],
)
def test_unusable_data(monkeypatch, broken_shapes, tmp_path, spoil, says):
    spoil(broken_shapes)
    assert says in complaint(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path / 'work', *options(broken_shapes))
    assert not (tmp_path / 'work').exists()


def test_images_without_annotations_can_be_predicted_for_submission(monkeypatch, broken_shapes, trained, tmp_path):
    spoil_json(lambda coco: coco.pop('annotations'), 'val')(broken_shapes)
    args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', tmp_path / 'work', *options(broken_shapes)]
    assert 'no list of "annotations"' in complaint(monkeypatch, 'test', *args)
    out = tmp_path / 'submission'
    run_tool(monkeypatch, 'test', *args, 'test_evaluator.format_only=True', f'test_evaluator.outfile_prefix={out}')
    assert json.loads((tmp_path / 'submission.segm.json').read_text())


def test_unusable_config_and_checkpoint(monkeypatch, shapes, trained, tmp_path):
    assert 'config absent.py: no such file' in complaint(monkeypatch, 'train', 'absent.py')
    assert 'config absent.py: no such file' in complaint(monkeypatch, 'test', 'absent.py', 'absent.pth')
    text = tmp_path / 'text.pth'
    text.write_text('not a checkpoint')
    no_weights = tmp_path / 'epochs.pth'
    torch.save(dict(epoch=3), no_weights)
    for path, says in (('absent.pth', 'no such file'), (text, 'not a checkpoint'), (no_weights, 'holds no weights')):
        assert says in complaint(monkeypatch, 'test', CONFIG, path, '--work-dir', tmp_path, *options(shapes))
        assert says in complaint(
            monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, '--resume', path, *options(shapes)
        )
    for option, says in (
        ('model.backbone.conditioning.lam=2.0', 'made with conditioning'),
        ('model.rpn_head.anchor_generator.scales=[4,8]', 'does not fit the configured model'),
    ):
        args = [CONFIG, trained / 'epoch_1.pth', '--work-dir', tmp_path, *options(shapes), option]
        assert says in complaint(monkeypatch, 'test', *args)
