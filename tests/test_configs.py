"""Build the configs and compare the models with their names."""

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine import fileio
from mmengine.config import Config, utils
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from spec_mmdet.conditioning import describe_conditioning
from spec_mmdet.configs import read_config
from spec_mmdet.models.xcit import ARCHS

CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('xcit_*.py'))
COCO = [name for name in CONFIGS if not name.endswith(('shapes', 'semanticfpn', 'upernet'))]
SCHEDULES = ('1x', 'lsj_100e')
TWINS = {name.replace('xcit_', 'xcit_spec_', 1): name for name in COCO if 'spec' not in name}

# Channels, blocks, heads and stochastic depth of the reference implementation's detectors, and their files.
FAMILY = {
    ('tiny_12', 16): (192, 12, 4, 0.0),
    ('tiny_12', 8): (192, 12, 4, 0.0),
    ('small_12', 16): (384, 12, 8, 0.05),
    ('small_12', 8): (384, 12, 8, 0.05),
    ('small_24', 16): (384, 24, 8, 0.1),
    ('small_24', 8): (384, 24, 8, 0.1),
    ('medium_24', 16): (512, 24, 8, 0.15),
    ('medium_24', 8): (512, 24, 8, 0.15),
}


def load(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


# One of each detector; those of other sizes differ in the backbone's size and the neck's input, see test_family.
TRAINED = [name for name in COCO if 'spec' in name and not name.endswith(SCHEDULES)]
TRAINED = [name for name in TRAINED if '_p' not in name or name == 'xcit_spec_tiny_12_p8_maskrcnn']


@pytest.mark.parametrize('name', TRAINED)
def test_coco_configs_take_a_training_step(name):
    cfg = load(name)
    cfg.model.data_preprocessor.pop('batch_augments', None)  # pads to 1024 x 1024, which needs 11 GB
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    assert describe_conditioning(model.state_dict()) == "dict(type='identity', lam=10)"
    shapes = [[3, 96, 64], [3, 64, 96]]
    panoptic = 'panoptic_fusion_head' in cfg.model
    batch = demo_mm_inputs(2, shapes, num_classes=80, with_mask=True, use_box_type=True, with_semantic=panoptic)
    batch = model.data_preprocessor(batch, training=True)
    loss = model.parse_losses(model(**batch, mode='loss'))[0]
    loss.backward()
    assert loss.isfinite()
    # With several processes a parameter without gradient would be an error in the second step.
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.backbone.patch_embed.proj['0'][0].weight.grad.any()


@pytest.mark.parametrize(('arch', 'patch_size'), FAMILY)
def test_family(arch, patch_size):
    canonical = (arch, patch_size) == ('small_12', 16)
    model = load('xcit_maskrcnn' if canonical else f'xcit_{arch}_p{patch_size}_maskrcnn').model
    backbone = model.backbone
    assert (backbone.arch, backbone.patch_size) == (arch, patch_size)
    dims = ARCHS[arch]
    built = dims['dim'], dims['depth'], dims['num_heads'], backbone.drop_path_rate
    assert built == FAMILY[arch, patch_size] and model.neck.in_channels == [dims['dim']] * 4


def test_optimiser():
    cfg = load('xcit_spec_maskrcnn')
    model = MODELS.build(cfg.model)
    assert [block.drop_path for block in model.backbone.blocks] == [0.05] * 12
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.optim_wrapper.type = 'OptimWrapper'
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(group['params'][0]): group['weight_decay'] for group in groups}
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.modules.batchnorm._BatchNorm)]
    undecayed = {id(p) for norm in norms for p in norm.parameters()}
    for parameter_name, parameter in model.named_parameters():
        last = parameter_name.split('.')[-1]
        free = last in ('bias', 'temperature', 'gamma1', 'gamma2', 'gamma3') or id(parameter) in undecayed
        assert decay[id(parameter)] == (0 if free else 0.05), parameter_name


def test_plain_and_conditioned_configs_differ_only_in_conditioning():
    assert len(TWINS) == 11
    for spec, plain in TWINS.items():
        spec, plain = load(spec).to_dict(), load(plain).to_dict()
        assert spec['model']['backbone'].pop('conditioning') == dict(type='identity', lam=10.0)
        assert plain == spec


def test_other_schedules_have_their_stated_length():
    for name, rounds, epochs, milestones in (('1x', 1, 12, [8, 11]), ('lsj_100e', 4, 25, [22, 24])):
        cfg = load(f'xcit_spec_maskrcnn_{name}')
        assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == epochs
        assert cfg.param_scheduler[1].milestones == milestones
        assert cfg.train_dataloader.dataset.get('times', 1) == rounds
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'
        assert cfg.model == load('xcit_spec_maskrcnn').model


def test_schedule_and_augmentation_are_xcits():
    cfg = Config.fromfile(ROOT / 'configs' / 'xcit_maskrcnn.py')
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 36
    assert cfg.param_scheduler[1].milestones == [27, 33]
    assert cfg.param_scheduler[0].end == 500 and cfg.param_scheduler[0].start_factor == 1e-3
    assert cfg.auto_scale_lr.base_batch_size == 16
    resize, crop = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert [min(scale) for scale in resize[0].scales] == list(range(480, 801, 32))
    assert crop[1].crop_size == (384, 600)
    assert cfg.optim_wrapper.optimizer.type == 'AdamW' and cfg.optim_wrapper.get('clip_grad') is None


def test_files_of_packages_are_read_once(monkeypatch):
    read = []
    monkeypatch.setattr(utils, 'load', lambda path: read.append(path) or fileio.load(path))
    cfg = read_config(ROOT / 'configs' / 'xcit_maskrcnn.py')
    assert len(read) == len({*read}) > 50
    assert utils.load.__name__ == '<lambda>'  # restored
    assert cfg.to_dict() == load('xcit_maskrcnn').to_dict()


def test_the_text_of_a_config_follows_its_changes():
    cfg = read_config(ROOT / 'configs' / 'xcit_spec_shapes.py')
    assert cfg.pretty_text is cfg.pretty_text and 'lam=1.0' in cfg.pretty_text
    cfg.model.backbone.conditioning.lam = 2.5
    assert 'lam=2.5' in cfg.pretty_text
