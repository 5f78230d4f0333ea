"""Test that schedules fit the training, and the learning rates of fine-tuning."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import CONFIG, ROOT
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS

from spec_mmdet import InputError
from spec_mmdet.training.hooks import check_schedule
from spec_mmdet.training.schedule import set_epochs, set_image_size

FINETUNE = ROOT / 'configs' / 'presets' / 'finetune.py'


YOLOX = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
NAMES = ('xcit_maskrcnn', 'preset', YOLOX, 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')


def load(name: str) -> Config:
    return get_config(name) if '::' in name else Config.fromfile(ROOT / 'configs' / f'{name}.py')


def test_epochs_rescale_the_complete_schedule():
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
@given(epochs=st.integers(1, 12), length=st.integers(1, 8), name=st.sampled_from(NAMES))
def test_the_learning_rate_rises_and_falls_within_any_training(epochs, length, name):
    """Return the learning rate that the schedulers set, step by step: its peak and its end are within the training."""
    assume(length > 1 or name != YOLOX)  # its last phase starts at 95 % of the training
    cfg, preset = load('xcit_maskrcnn' if name == 'preset' else name), name == 'preset'
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


def test_image_size_reaches_borders_batches_and_pipelines_of_hooks():
    cfg = load(YOLOX)
    set_image_size(cfg, 128)
    mosaic, affine, mixup = cfg.train_dataloader.dataset.pipeline[:3]
    assert tuple(mosaic.img_scale) == tuple(mixup.img_scale) == (128, 128) and tuple(affine.border) == (-64, -64)
    assert tuple(cfg.model.data_preprocessor.batch_augments[0].random_size_range) == (96, 160)
    cfg = load('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    set_image_size(cfg, 128)
    resize, crop = cfg.custom_hooks[1].switch_pipeline[2:4]
    assert tuple(resize.scale) == tuple(crop.crop_size) == (128, 128)
    cfg = load('mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py')  # no Resize in tests
    set_image_size(cfg, 128)
    assert {tuple(t.scale) for t in cfg.train_dataloader.dataset.dataset.pipeline if t.type == 'Resize'} == {(128, 128)}


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
    with pytest.raises(InputError, match='needs the backbone SpecXCiT, but the model has Linear'):
        build_optim_wrapper(torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(1, 1))), cfg.optim_wrapper)


def doubts(iterations: int, epoch: int, *schedulers, hooks=()) -> list[str]:
    loop = SimpleNamespace(max_iters=iterations)
    runner = SimpleNamespace(train_loop=loop, train_dataloader=range(epoch), param_schedulers=schedulers, hooks=hooks)
    return check_schedule(runner)


def test_a_schedule_that_does_not_fit_is_reported():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm_up = LinearLR(optimizer, start_factor=0.001, by_epoch=False, begin=0, end=500)
    drops = MultiStepLR(optimizer, milestones=[27, 33], by_epoch=True)
    # 32 images in batches of 2: an earlier command of the README, whose warm-up lasted until epoch 31.
    (doubt,) = doubts(36 * 16, 16, warm_up, drops)
    assert ' 432' in doubt and ' 500' in doubt
    (doubt, _) = doubts(16, 16, warm_up, drops)
    assert ' 500 ' in doubt and ' 16' in doubt
    assert not doubts(36 * 7000, 7000, warm_up, drops)
    assert not doubts(36 * 100, 100, warm_up, CosineAnnealingLR(optimizer, T_max=36))


COSINE = dict(type='CosineAnnealingLR', begin=0, end=4, by_epoch=True, convert_to_iter_based=True)
WARM_UP = dict(type='LinearLR', start_factor=0.1, begin=0, end=6, by_epoch=False)
OTHERS = {
    'learning rate': (dict(lr=1e-4), None),
    'weight decay': (dict(weight_decay=0.3), None),
    'momentum': (dict(betas=[0.8, 0.9]), None),
    'longer': ({}, [WARM_UP, COSINE | dict(end=8)]),
    'steps': (dict(lr=1e-3), [dict(type='MultiStepLR', milestones=[1, 3], by_epoch=True)]),
    'none': (dict(lr=1e-3), []),
}


@HOOKS.register_module()
class RateRecorder(Hook):
    """Record the optimiser's settings in each iteration."""

    def __init__(self, to: dict) -> None:
        self.to = to

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        group = runner.optim_wrapper.optimizer.param_groups[0]
        self.to[runner.iter] = [group['lr'], group['weight_decay'], tuple(group['betas'])]


def record(work, schedulers, optimizer, caplog, **settings) -> tuple[dict, str]:
    """Train four epochs of four iterations; return the settings by iteration, and the warnings about them."""
    found = {}
    caplog.clear()
    runner = toy.runner(
        work,
        param_scheduler=schedulers,
        optim_wrapper=dict(optimizer=dict(dict(type='AdamW', lr=0.01), **optimizer), accumulative_counts=3),
        custom_hooks=[dict(type='CheckpointGuard'), dict(type='RateRecorder', to=found)],
        default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', interval=1)),
        log_level='WARNING',
        **settings,
    )
    runner.logger.addHandler(caplog.handler)
    runner.train()
    return found, ' '.join(r.getMessage() for r in caplog.records if 'settings replace' in r.getMessage())


@pytest.mark.parametrize('other', OTHERS)
def test_a_resumed_training_has_the_schedule_of_its_config(tmp_path, caplog, other):
    """The truth is a training that had the other schedule from the start."""
    optimizer, schedulers = OTHERS[other]
    schedulers = [WARM_UP, COSINE] if schedulers is None else schedulers or None
    before, said = record(tmp_path / 'first', [WARM_UP, COSINE], {}, caplog)
    assert not said
    truth, _ = record(tmp_path / 'truth', schedulers, optimizer, caplog)
    resume = dict(resume_from=tmp_path / 'first' / 'epoch_2.pth')
    found, said = record(tmp_path / 'same', [WARM_UP, COSINE], {}, caplog, **resume)
    assert not said and found == {i: before[i] for i in range(8, 16)}
    found, said = record(tmp_path / 'other', schedulers, optimizer, caplog, **resume)
    assert found == {i: truth[i] for i in range(8, 16)} and truth[8] != before[8]
    assert all(key in said for key in optimizer) and ('param_scheduler' in said) == (schedulers != [WARM_UP, COSINE])


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path, caplog):
    record(tmp_path / 'first', None, {}, caplog, epochs=1)
    resumed = toy.runner(
        tmp_path / 'other',
        resume_from=tmp_path / 'first' / 'epoch_1.pth',
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='CheckpointGuard')],
    )
    with pytest.raises(InputError, match='SGD .* momentum'):
        resumed.train()
