"""Test that schedules fit the training, and the learning rates of fine-tuning."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIG, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS

from spec_mmdet.training.hooks import check_schedule
from spec_mmdet.training.schedule import set_epochs, set_image_size

FINETUNE = ROOT / 'configs' / 'presets' / 'finetune.py'


def load(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


def test_epochs_reach_the_whole_schedule():
    cfg = load('xcit_maskrcnn')
    set_epochs(cfg, 72)
    warm_up, drops = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == drops.end == 72 and drops.milestones == [54, 66]
    assert (warm_up.type, warm_up.end, warm_up.start_factor) == ('WarmUpLR', pytest.approx(3.6), 0.001)
    set_epochs(cfg, 12)
    assert warm_up.end == pytest.approx(0.6) and drops.milestones == [9, 11]
    set_epochs(cfg, 1)
    assert drops.milestones == [] and drops.end == 1


@settings(max_examples=25)
@given(epochs=st.integers(1, 12), length=st.integers(1, 8), preset=st.booleans())
def test_the_rate_rises_and_falls_within_any_training(epochs, length, preset):
    """Return the learning rate that the schedulers set, step by step: its peak and its end are within the training."""
    cfg = load('xcit_maskrcnn')
    if preset:
        cfg.merge_from_dict(Config.fromfile(FINETUNE).to_dict())
    set_epochs(cfg, epochs)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    built = [
        PARAM_SCHEDULERS.build(
            {**s, '_scope_': 'mmengine'}, default_args=dict(optimizer=optimizer, epoch_length=length)
        )
        for s in map(dict, cfg.param_scheduler)
    ]
    rates = []
    for i in range(epochs * length):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in built:
            if not scheduler.by_epoch or (i + 1) % length == 0:
                scheduler.step()
    if len(rates) > 40:
        peak = int(np.argmax(rates))
        assert peak <= 0.1 * len(rates) + length * (not preset)
        assert max(rates) > 0.85
        if epochs >= 3:
            assert rates[-1] < 0.02 if preset else rates[-1] <= 0.11
    assert min(rates) > 0


def test_image_size_reaches_scales_crops_and_test():
    cfg = load('xcit_maskrcnn')
    set_image_size(cfg, 400)
    resize, crop = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert [tuple(scale) for scale in resize[0].scales] == [(240 + 16 * i, 666) for i in range(11)]
    assert [tuple(scale) for scale in crop[0].scales] == [(200, 666), (250, 666), (300, 666)]
    assert tuple(crop[1].crop_size) == (192, 300)
    for loop in ('val', 'test'):
        assert tuple(cfg[f'{loop}_dataloader'].dataset.pipeline[1].scale) == (666, 400)
    cfg = load('xcit_spec_maskrcnn_lsj_100e')
    set_image_size(cfg, 400)
    resize, crop = cfg.train_dataloader.dataset.dataset.pipeline[3:5]
    assert tuple(resize.scale) == tuple(crop.crop_size) == (512, 512) and tuple(resize.ratio_range) == (0.1, 2.0)


def test_layer_decay():
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(Config.fromfile(FINETUNE).to_dict())
    cfg.optim_wrapper.type = 'OptimWrapper'
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(group['params'][0]): (group['lr'], group['weight_decay']) for group in groups}
    for name, parameter in model.named_parameters():
        if name.startswith(('backbone.patch_embed', 'backbone.pos_embeder')):
            assert id(parameter) not in rates
            continue
        block = int(name.split('.')[2]) if name.startswith('backbone.blocks.') else 6
        rate, decay = rates[id(parameter)]
        assert rate == pytest.approx(1e-4 * 0.8 ** (6 - block)), name
        assert decay == (0 if name.endswith(('bias', 'temperature')) or '.norm' in name or '.gamma' in name
                         or '.bn.' in name or '.fpn1.1.' in name else 0.05), name  # fmt: skip


def doubts(iterations: int, epoch: int, *schedulers, hooks=()) -> list[str]:
    loop = SimpleNamespace(max_iters=iterations)
    runner = SimpleNamespace(train_loop=loop, train_dataloader=range(epoch), param_schedulers=schedulers, hooks=hooks)
    return check_schedule(runner)


def test_a_schedule_that_does_not_fit_is_told():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm_up = LinearLR(optimizer, start_factor=0.001, by_epoch=False, begin=0, end=500)
    drops = MultiStepLR(optimizer, milestones=[27, 33], by_epoch=True)
    # 32 images in batches of 2: an earlier command of the README, whose warm-up lasted until epoch 31.
    (doubt,) = doubts(36 * 16, 16, warm_up, drops)
    assert 'drops at iteration 432, before its warm-up ends at 500' in doubt
    (doubt, _) = doubts(16, 16, warm_up, drops)
    assert 'the warm-up takes 500 iterations and the training 16' in doubt
    assert not doubts(36 * 7000, 7000, warm_up, drops)
    assert not doubts(36 * 100, 100, warm_up, CosineAnnealingLR(optimizer, T_max=36))
