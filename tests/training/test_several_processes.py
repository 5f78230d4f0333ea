"""Several processes take the steps of one that accumulates gradients, and resume from each other's checkpoints."""

import copy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import toy
from conftest import CONFIG, in_processes
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.dist import all_gather, get_rank
from mmengine.hub import get_config
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner

from spec_mmdet import BufferGuard, InputError
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.data.fitting import set_classes
from spec_mmdet.data.shapes import CATEGORIES
from spec_mmdet.data.tasks import use_folder
from spec_mmdet.models.connecting import connect_backbone

ON_CPU = dict(launcher='pytorch', cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)))


def toy_runner(work: Path, processes: int, batch: int, accumulate: int, resume_from=None, **settings) -> Runner:
    optim = dict(optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=accumulate)
    settings['train_dataloader'] = toy.loader(batch_size=batch)
    return toy.runner(
        work, resume_from=resume_from, optim_wrapper=optim, **settings, **(ON_CPU if processes > 1 else {})
    )


def assert_close(one: Path, other: Path, **tolerance) -> None:
    """Compare the weights of two checkpoints, and their numbers of steps."""
    contents = [load(path) for path in (one, other)]
    ours, theirs = (content['state_dict'] for content in contents)
    for name, value in ours.items():
        if 'running_' not in name and 'num_batches' not in name:  # batches of another size
            torch.testing.assert_close(value, theirs[name], **tolerance)
    steps = [{state['step'].item() for state in content['optimizer']['state'].values() if 'step' in state}
             for content in contents]  # fmt: skip
    assert steps[0] == steps[1]


def test_two_processes_equal_one_that_accumulates(tmp_path):
    """Random samples in a random order, through dropout."""
    in_processes(2, tmp_path / 'two', lambda: toy_runner(tmp_path / 'two', 2, 1, 1).train())
    toy_runner(tmp_path / 'one', 1, 1, 2).train()
    assert_close(tmp_path / 'two' / 'epoch_4.pth', tmp_path / 'one' / 'epoch_4.pth', rtol=1e-5, atol=1e-6)


def detector(work: Path, data: Path, processes: int, accumulate: int) -> Runner:
    """The demo's, with flips and stochastic depth."""
    cfg = Config.fromfile(CONFIG)
    use_folder(cfg, data, ('train',))
    set_classes(cfg, CATEGORIES)
    cfg.merge_from_dict(
        {
            'train_dataloader.batch_size': 1,
            'train_dataloader.dataset.indices': 4,
            'train_dataloader.dataset.pipeline.2.scale': (64, 64),
            'model.backbone.arch.depth': 4,
            'model.backbone.drop_path_rate': 0.5,
            'optim_wrapper': dict(
                _delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-2), accumulative_counts=accumulate
            ),
            'param_scheduler': [],
            'train_cfg.max_epochs': 1,
            'model_wrapper_cfg': dict(type='MMDistributedDataParallel', device_ids=None),
            'launcher': 'pytorch' if processes > 1 else 'none',
            'work_dir': str(work),
            'default_hooks.checkpoint': dict(_delete_=True, type='AtomicCheckpointHook', interval=1),
            'custom_hooks': [],
            'log_level': 'ERROR',
        }
    )
    for name in ('val', 'test'):
        cfg.update({f'{name}_{part}': None for part in ('cfg', 'dataloader', 'evaluator')})
    return Runner.from_cfg(cfg)


def test_two_processes_train_a_detector_like_one_that_accumulates(shapes, tmp_path):
    in_processes(2, tmp_path / 'two', lambda: detector(tmp_path / 'two', shapes, 2, 1).train())
    detector(tmp_path / 'one', shapes, 1, 2).train()
    assert_close(tmp_path / 'two' / 'epoch_1.pth', tmp_path / 'one' / 'epoch_1.pth', rtol=1e-4, atol=1e-6)


def test_a_detector_that_reads_three_maps_leaves_no_parameter_unused(tmp_path):
    """Distributed training without find_unused_parameters fails if the map of stride 4 is made."""
    cfg = get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model
    cfg.backbone = dict(type='SpecXCiT', arch=dict(dim=32, depth=4, num_heads=4))
    connected = copy.deepcopy(cfg)
    connect_backbone(connected)
    cfg.neck.in_channels = [32] * 4

    def take_two_steps(cfg: dict) -> None:
        model = MMDistributedDataParallel(MODELS.build(cfg).train())
        for _ in range(2):
            batch = model.module.data_preprocessor(demo_mm_inputs(1, [[3, 64, 64]]), training=True)
            model.module.parse_losses(model(**batch, mode='loss'))[0].backward()

    def train() -> None:
        take_two_steps(connected)
        with pytest.raises(RuntimeError, match='find_unused_parameters'):
            take_two_steps(cfg)

    in_processes(2, tmp_path, train)


def test_half_accumulated_gradients_and_another_number_of_processes(tmp_path):
    plain = dict(model=dict(type=toy.Line, dropout=0.0))
    always = dict(plain, default_hooks=dict(checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=1)))
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    in_processes(2, whole, lambda: toy_runner(whole, 2, 1, 3, **always).train())
    half = whole / 'iter_5.pth'
    in_processes(2, resumed, lambda: toy_runner(resumed, 2, 1, 3, half, **always).train())
    assert_close(whole / 'iter_16.pth', resumed / 'iter_16.pth', rtol=0, atol=0)
    toy_runner(tmp_path / 'alone', 1, 2, 3, half, **always).train()
    assert_close(whole / 'iter_16.pth', tmp_path / 'alone' / 'iter_16.pth', rtol=1e-5, atol=1e-6)
    for checkpoint in (half, whole / 'iter_8.pth'):
        with pytest.raises(InputError, match='with 2 images an iteration instead of 1'):
            toy_runner(tmp_path / 'other', 1, 1, 3, checkpoint, **always).train()


def test_all_processes_evaluate_what_the_main_process_saves(tmp_path):
    def train() -> None:
        torch.manual_seed(get_rank())
        model = MMDistributedDataParallel(torch.nn.BatchNorm1d(3))
        model(torch.randn(4, 3))
        before = {name: all_gather(buffer.clone()) for name, buffer in model.module.named_buffers()}
        assert not torch.equal(*before['running_mean'])
        BufferGuard().before_val_epoch(Mock(model=model))
        for name, buffer in model.module.named_buffers():
            assert torch.equal(buffer, before[name][0]), name

    in_processes(2, tmp_path, train)


def test_pytorch_has_no_synchronised_statistics_on_a_cpu(tmp_path):
    """With such statistics, one process with the complete batch can be compared with two."""

    def normalise() -> None:
        with pytest.raises(ValueError, match='SyncBatchNorm expected input tensor to be on'):
            torch.nn.SyncBatchNorm(3)(torch.randn(2, 3, 4))

    in_processes(2, tmp_path, normalise)
