"""Pretraining: the runner's accuracy, resuming, weights for a detector, and rejected inputs."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_line, run_tool
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.config import Config
from PIL import Image
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from research.scenes import Figures, write_crops
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.evaluation.accuracy import TopK
from spec_mmdet.models.xcit import SpecXCiT

CONFIG = 'pretrain_xcit_nano_12_p16'
ARCH = dict(dim=16, depth=4, num_heads=2)
CONDITIONING = dict(type='identity', lam=2.0)


def options(work: Path, *more: str) -> list:
    settings = ['model.backbone.arch._delete_=True']
    settings += [f'model.backbone.arch.{key}={value}' for key, value in ARCH.items()]
    settings += [f'model.backbone.conditioning.{key}={value}' for key, value in CONDITIONING.items()]
    settings += ['model.backbone.patch_size=8', 'default_hooks.checkpoint.interval=1', 'train_cfg.val_interval=1']
    settings += ['default_hooks.ema.momentum=0.3']  # a moving average over eight iterations
    for split in ('train', 'val'):
        settings += [f'{split}_dataloader.num_workers=0', f'{split}_dataloader.persistent_workers=False']
    sizes = ['--image-size', 32, '--batch-size', 8, '--epochs', 2, '--lr', 0.01]
    return [*sizes, '--work-dir', work, *more, '--cfg-options', *settings]


@pytest.fixture(scope='module')
def crops(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('crops')
    for i, (split, images) in enumerate(dict(train=32, val=16).items()):
        write_crops(root, split, images, 32, Figures(), np.random.default_rng(i))
    return root


@pytest.fixture(scope='module')
def pretrained(crops, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp('pretrained') / 'work'
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, 'pretrain', CONFIG, '--data', crops, *options(work))
    return work


def test_condition_numbers_are_recorded(pretrained):
    layers = {line.split(',')[1] for line in (pretrained / 'conditioning.csv').read_text().splitlines()[1:]}
    assert len(layers) >= ARCH['depth']


def test_accuracy_is_that_of_the_saved_weights(pretrained, crops, capsys):
    cfg = Config.fromfile(next(pretrained.glob('*.py')))
    model = MODELS.build(cfg.model)
    model.load_state_dict(load(pretrained / 'epoch_2.pth')['state_dict'])
    images = ImageFolder(crops / 'val', create_transform(32, interpolation='bicubic', crop_pct=1.0))
    inputs, targets = zip(*images)
    with torch.no_grad():
        found = model.eval()(torch.stack(inputs), torch.tensor(targets)).argsort(descending=True)
    right = found == torch.tensor(targets)[:, None]
    lines = [line for path in sorted(pretrained.glob('*/*.log')) for line in path.read_text().splitlines()]
    said = next(line for line in reversed(lines) if 'accuracy/top1' in line)
    for k in (1, 5):
        assert f'accuracy/top{k}: {100 * right[:, :k].any(dim=1).float().mean():.4f}' in said


@given(st.integers(2, 9), st.randoms(use_true_random=False))
def test_classes_with_equal_logits_are_ranked_like_argmax(classes, random):
    logits = torch.tensor([[float(random.randint(0, 2)) for _ in range(classes)] for _ in range(8)])
    targets = torch.tensor([random.randrange(classes) for _ in range(8)])
    metric = TopK()
    metric.process(dict(targets=targets), list(logits))
    right = 100 * (logits.numpy().argmax(1) == targets.numpy()).mean()
    assert metric.compute_metrics(metric.results)['top1'] == pytest.approx(right)


def test_a_resumed_pretraining_equals_an_uninterrupted_one(monkeypatch, pretrained, crops, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(pretrained / 'epoch_1.pth', work)
    run_tool(monkeypatch, 'pretrain', CONFIG, '--data', crops, *options(work, '--resume'))
    ours, theirs = (load(folder / 'epoch_2.pth') for folder in (work, pretrained))
    for part in ('state_dict', 'ema_state_dict'):  # the first of them is the average
        assert ours[part].keys() == theirs[part].keys()
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), (part, name)
    assert any(not torch.equal(theirs['state_dict'][name], theirs['ema_state_dict'][f'module.{name}'])
               for name in theirs['state_dict'])  # fmt: skip


def test_a_detector_loads_the_pretrained_backbone(monkeypatch, pretrained, tmp_path):
    converted = tmp_path / 'backbone.pth'
    run_tool(monkeypatch, 'convert', pretrained / 'epoch_2.pth', converted)
    cfg = Config.fromfile(next(pretrained.glob('*.py')))
    classifier = MODELS.build(cfg.model)
    classifier.load_state_dict(load(pretrained / 'epoch_2.pth')['state_dict'])
    init_cfg = dict(type='Pretrained', checkpoint=str(converted))
    backbone = SpecXCiT(ARCH, 8, CONDITIONING, init_cfg=init_cfg)
    backbone.init_weights()
    image = torch.randn(1, 3, 40, 64)
    with torch.no_grad():
        for ours, theirs in zip(
            backbone.eval().compute_tokens(image), classifier.backbone.eval().compute_tokens(image), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_unusable_pretraining_data_is_rejected(monkeypatch, crops, tmp_path):
    data = tmp_path / 'data'

    def refused(config: str = CONFIG, *more) -> str:
        return error_line(monkeypatch, 'pretrain', config, '--data', data, *options(tmp_path / 'work', *more))

    assert '"spec-mmdet train"' in refused('xcit_maskrcnn')
    assert 'lacks the folder train/' in refused()
    shutil.copytree(crops, data)
    assert 'batch size of 64' in refused(CONFIG, '--batch-size', '64')
    assert 'an even number' in refused(CONFIG, '--batch-size', '7')
    victim = next((data / 'val').rglob('*.png'))
    victim.write_bytes(victim.read_bytes()[:200])
    assert f'{victim} (corrupt or truncated images)' in refused()
    shutil.rmtree(victim.parent)
    assert f'{data}/train and {data}/val have different classes: {victim.parent.name}' in refused()
    shutil.rmtree(data / 'val')
    (data / 'val').mkdir()
    assert f"{data}/val: Couldn't find any class folder" in refused()
    for folder in (victim.parent.parent, data / 'train'):
        shutil.rmtree(folder)
        shutil.copytree(crops / 'train' / victim.parent.name, folder / victim.parent.name)
    assert f'contains only the class {victim.parent.name}' in refused(CONFIG, '--batch-size', '2')
    assert not (tmp_path / 'work').exists()


def test_a_missing_timm_is_named(monkeypatch, crops, tmp_path):
    monkeypatch.delitem(sys.modules, 'spec_mmdet.data.classification', raising=False)
    monkeypatch.setitem(sys.modules, 'timm.data', None)
    assert 'pip install timm' in error_line(monkeypatch, 'pretrain', CONFIG, '--data', crops)


def test_images_are_read_as_in_timm(crops):
    from spec_mmdet.data.classification import ClassFolder

    transform = dict(input_size=32, interpolation='bicubic', crop_pct=1.0)
    ours = ClassFolder(str(crops / 'val'), transform)
    path, target = ours.samples[5]
    expected = create_transform(**transform)(Image.open(path).convert('RGB'))
    assert torch.equal(ours[5]['inputs'], expected) and ours[5]['targets'] == target
