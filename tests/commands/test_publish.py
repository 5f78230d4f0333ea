"""A published folder is complete: its checksums hold, and its weights predict the same as the checkpoint."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import torch
from conftest import CONFIG, error_line, run_tool
from mmengine.config import Config
from safetensors.torch import load_file

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.commands import run
from spec_mmdet.inference.publishing import remove_local_settings


def test_a_published_detector_predicts_the_same(monkeypatch, trained, shapes, tmp_path, capsys):
    checkpoint, out = trained / 'epoch_1.pth', tmp_path / 'published'
    run('publish', [str(checkpoint), '--out', str(out), '--licence', 'CC-BY-4.0'])
    assert sorted(path.name for path in out.iterdir()) == [
        'README.md', 'SHA256SUMS', 'config.py', 'model.pth', 'model.safetensors'
    ]  # fmt: skip
    subprocess.run(['sha256sum', '--check', 'SHA256SUMS'], cwd=out, check=True, stdout=subprocess.DEVNULL)
    whole, published, tensors = load(checkpoint), load(out / 'model.pth'), load_file(out / 'model.safetensors')
    assert set(published) == {'meta', 'state_dict'} and set(published['meta']) == {'dataset_meta'}
    for name, value in whole['state_dict'].items():
        assert torch.equal(value, published['state_dict'][name]) and torch.equal(value, tensors[name])
    card = (out / 'README.md').read_text()
    assert all(text in card for text in ("dict(type='identity', lam=1)", 'circle, square', 'CC-BY-4.0', 'bbox_mAP |'))
    assert not any(str(folder) in (out / 'config.py').read_text() for folder in (trained, shapes))
    for split in ('train', 'val'):
        content = (shapes / 'annotations' / f'instances_{split}.json').read_bytes()
        assert f'instances_{split}.json (SHA-256 {hashlib.sha256(content).hexdigest()})' in card
    assert '| weights | after epoch 1; SHA-256' in card

    image = shapes / 'val' / '000001.png'
    for name, config, model in (
        ('a', trained / 'xcit_spec_shapes.py', checkpoint),
        ('b', out / 'config.py', out / 'model.safetensors'),
    ):
        run_tool(monkeypatch, 'predict', config, model, image, '--score', 0, '--no-pictures', '--out', tmp_path / name)
    expected, found = (json.loads((tmp_path / name / 'predictions.json').read_text()) for name in 'ab')
    assert expected == found and len(found) > 10


LOAD = """
import sys
from mmdet.apis import DetInferencer, inference_detector, init_detector
assert 'spec_mmdet.registered' not in sys.modules
model = init_detector('config.py', 'model.pth', device='cpu')
inferencer = DetInferencer('config.py', 'model.pth', device='cpu')
print(type(model.backbone).__name__, *inferencer.visualizer.dataset_meta['classes'])
a = inference_detector(model, sys.argv[1]).pred_instances
b = inferencer(sys.argv[1], return_datasamples=True, no_save_vis=True)['predictions'][0].pred_instances
assert (a.scores == b.scores).all() and len(a)
"""


def test_mmdetection_loads_a_published_detector(trained, shapes, tmp_path):
    """In a new process, without an import by hand, also if the training's config lacks one."""
    cfg = Config.fromfile(trained / 'xcit_spec_shapes.py')
    cfg.pop('custom_imports')
    cfg.dump(tmp_path / 'training.py')
    out = tmp_path / 'published'
    run('publish', [str(trained / 'epoch_1.pth'), '--config', str(tmp_path / 'training.py'), '--out', str(out)])
    command = [sys.executable, '-c', LOAD, str(shapes / 'val' / '000001.png')]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert 'SpecXCiT circle square' in done.stdout


def test_ap_of_other_weights_is_not_on_the_card(trained, tmp_path, capsys):
    """Neither of the epoch before an interrupted checkpoint, nor of another training's table."""
    content = load(trained / 'epoch_1.pth')
    run_info = content['meta']['run']
    for name, meta in (
        ('interrupted', dict(content['meta'], iter=55, iter_in_epoch=15)),
        ('copied', dict(content['meta'], run=dict(run_info, seed=7))),
    ):
        folder = tmp_path / name
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns('*.pth', '2*'))
        torch.save(dict(content, meta=meta), folder / 'it.pth')
        run('publish', [str(folder / 'it.pth')])
        card = (folder / 'published' / 'README.md').read_text()
        assert 'bbox_mAP' not in card and 'contains no AP' in capsys.readouterr().out
        assert ('within epoch 2' in card) == (name == 'interrupted')


def test_inputs_that_cannot_be_published(monkeypatch, trained):
    for args, says in (
        (['absent.pth'], 'no such file'),
        ([trained / 'epoch_1.pth', '--config', 'absent.py'], '--config absent.py: no such file'),
        ([trained / 'epoch_1.pth', '--out', trained], 'not empty'),
    ):
        assert says in error_line(monkeypatch, 'publish', *args)


def test_a_published_config_has_no_local_paths():
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='/home/me/backbone.pth')
    cfg.model.neck.init_cfg = [dict(type='Xavier', layer='Conv2d'), dict(type='Pretrained', checkpoint='neck.pth')]
    cfg.work_dir, cfg.load_from = '/home/me/work', '../there.pth'
    cfg.train_dataloader.dataset.update(data_root='mine/set', ann_file='labels/train.json')
    for loop in ('val', 'test'):
        cfg[f'{loop}_dataloader'].dataset.update(data_root='/home/me/set/', ann_file='labels/val.json')
        cfg[f'{loop}_evaluator'].ann_file = '/home/me/set/labels/val.json'
    cfg.default_hooks.checkpoint.out_dir = '/home/me/checkpoints'
    cfg.train_dataloader.dataset.metainfo = dict(classes=('/dev/sda', '..'))
    remove_local_settings(cfg)
    assert not re.search(r'/home|mine|there|\.pth', cfg.pretty_text)
    assert cfg.train_dataloader.dataset.data_root == 'data' and cfg.val_dataloader.dataset.data_root == 'data/'
    assert cfg.train_dataloader.dataset.ann_file == 'labels/train.json'
    assert cfg.val_evaluator.ann_file == 'data/labels/val.json'
    assert cfg.model.neck.init_cfg == [dict(type='Xavier', layer='Conv2d')]
    assert cfg.train_dataloader.dataset.metainfo.classes == ('/dev/sda', '..')
