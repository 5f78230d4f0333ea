"""The configs build what they promise."""

import pytest
import torch
from conftest import ROOT
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from spec_mmdet.conditioning import describe_conditioning

CONDITIONING = dict(xcit_maskrcnn='None', xcit_spec_maskrcnn="dict(type='identity', lam=10)")


@pytest.fixture(params=CONDITIONING)
def config(request):
    cfg = Config.fromfile(ROOT / 'configs' / f'{request.param}.py')
    return request.param, cfg


def test_coco_configs(config):
    name, cfg = config
    model = MODELS.build(cfg.model)
    assert describe_conditioning(model.state_dict()) == CONDITIONING[name]
    assert [block.drop_path.drop_prob for block in model.backbone.blocks] == [0.05] * 12

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


def test_twins_differ_in_conditioning_alone():
    plain, spec = (Config.fromfile(ROOT / 'configs' / f'{name}.py').to_dict() for name in CONDITIONING)
    assert spec['model']['backbone'].pop('conditioning') == dict(type='identity', lam=10.0)
    assert plain == spec


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
