"""A training that is stopped and resumed ends with the weights of an uninterrupted one, bit for bit."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from conftest import CONFIG, run_tool
from mmdet.registry import DATASETS, HOOKS, TRANSFORMS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.data.shapes import CATEGORIES, write_split
from spec_mmdet.errors import InputError
from spec_mmdet.models import products
from spec_mmdet.training.exact import SeededDataset, keeps_state
from spec_mmdet.training.resume import explain_resume_errors


@HOOKS.register_module()
class SignalAt(Hook):
    """Send a signal to this process in an iteration of training or of evaluation."""

    def __init__(self, iteration: int = -1, evaluation: int = -1, number: int = signal.SIGTERM) -> None:
        self.iteration, self.evaluation, self.number = iteration, evaluation, number

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.iteration:
            os.kill(os.getpid(), self.number)

    def before_val_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.epoch == self.evaluation:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope='session')
def few_shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('few')
    for split, images in dict(train=8, val=2).items():
        write_split(root, split, images, 64, np.random.default_rng(len(split)))
    return root


NO_EVALUATION = ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
DROP = 'model.backbone.drop_path_rate=0.3'


@pytest.fixture
def fickle_kernels(monkeypatch):
    """Two threads, and a measurement that chooses other kernels in each resumed run."""
    order = iter([*2 * [['linear', 'convolution']], *9 * [['convolution', 'linear']]])
    monkeypatch.setattr(products, 'measure_kernels', lambda dtype: dict.fromkeys(products.SHAPES, next(order)))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)


def train(monkeypatch, data: Path, work: Path, *args, evaluate: bool = False) -> int:
    """Train three epochs of four iterations in a new process' state; return the exit status."""
    products.CHOSEN.clear()
    settings = ['train_dataloader.batch_size=2', 'train_cfg.max_epochs=3', 'param_scheduler.0.end=5', DROP]
    settings += ['train_dataloader.dataset.pipeline.2.scale=(64,64)', 'default_hooks.conditioning.interval=1000']
    settings += [] if evaluate else NO_EVALUATION
    resume = ['--resume'] if '--resume' in args else []
    settings += [arg for arg in args if arg != '--resume']
    command = [CONFIG, '--work-dir', work, '--data', data, *resume, '--cfg-options', *settings]
    try:
        run_tool(monkeypatch, 'train', *command)
    except SystemExit as ended:
        return ended.code
    return 0


def assert_same(one: object, other: object, where: str = '') -> None:
    """Compare bit for bit, except for the time and place of writing."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f'{where}.{key}')
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same(*pair, f'{where}.{i}')
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    contents = [load(path / 'epoch_3.pth') for path in (one, other)]
    for key in {*contents[0], *contents[1]} - {'meta', 'message_hub'}:
        assert_same(contents[0][key], contents[1][key], key)
    assert contents[0]['meta']['iter'] == contents[1]['meta']['iter'] == 12


EMA = ['default_hooks.ema.type=EMAHook', 'default_hooks.ema.momentum=0.5']
WORKERS = ['train_dataloader.num_workers=2', 'train_dataloader.persistent_workers=True']
CASES = {
    'plain': [],
    'an average of the weights': EMA,
    'accumulation that leaves a remainder': ['optim_wrapper.accumulative_counts=3'],
    'workers that persist': WORKERS,
}
TOGETHER = 'all at once'  # `make torture` tests the others
CASES[TOGETHER] = sum(CASES.values(), [])


@pytest.mark.parametrize('case', [TOGETHER])
def test_stopped_anywhere_and_resumed(monkeypatch, few_shapes, tmp_path, case, fickle_kernels):
    settings = CASES[case]
    assert train(monkeypatch, few_shapes, tmp_path / 'whole', *settings) == 0
    stopped = tmp_path / 'stopped'
    # Within the first epoch, in the middle of an accumulated step, and at the end of the second.
    for iteration, number in ((2, signal.SIGTERM), (8, signal.SIGINT)):
        resume = ['--resume'] if iteration > 2 else []
        at = ['default_hooks.signal_at.type=SignalAt', f'default_hooks.signal_at.iteration={iteration}']
        at.append(f'default_hooks.signal_at.number={int(number)}')
        assert train(monkeypatch, few_shapes, stopped, *resume, *settings, *at) == 128 + number
        assert load(stopped / 'interrupted.pth')['meta']['iter'] == iteration
    assert train(monkeypatch, few_shapes, stopped, '--resume', *settings) == 0
    assert_same_run(tmp_path / 'whole', stopped)
    used = load(stopped / 'epoch_3.pth')['meta']['products']
    assert used == {'float32, 2 threads': dict.fromkeys(products.SHAPES, ['linear', 'convolution'])}
    assert not (stopped / 'interrupted.pth').exists()
    # Also from the end of an epoch, as after a kill that left nothing else, and in another folder.
    shutil.copytree(stopped, tmp_path / 'moved')
    (tmp_path / 'moved' / 'epoch_3.pth').unlink()
    gone = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=gone.pth']
    assert train(monkeypatch, few_shapes, tmp_path / 'moved', '--resume', *settings, *gone) == 0
    assert_same_run(tmp_path / 'whole', tmp_path / 'moved')


class OwnGenerator:
    """Transform with its own random numbers, like those of albumentations."""

    generator = np.random.default_rng(0)

    def __call__(self, results: dict) -> dict:
        results['img'] = results['img'] + self.generator.integers(1, 9)
        return results


@pytest.mark.parametrize('kind', ['CachedMosaic', 'CachedMixUp', 'OwnGenerator', 'RandomAffine'])
def test_data_that_depends_on_the_images_before(monkeypatch, few_shapes, kind):
    monkeypatch.setitem(TRANSFORMS.module_dict, 'OwnGenerator', OwnGenerator)
    cfg = Config.fromfile(CONFIG).train_dataloader.dataset
    cfg.pipeline[1].with_mask = False
    cfg.pipeline.insert(3, ConfigDict(type=kind))
    cfg.update(data_root=str(few_shapes), metainfo=dict(classes=CATEGORIES))
    if kind.startswith('Cached'):
        cfg.pipeline[3].img_scale = (64, 64)
    assert keeps_state(SeededDataset(DATASETS.build(cfg))) == (kind != 'RandomAffine')


def test_early_stopping_remembers_the_evaluations_before_a_resumption(monkeypatch, tmp_path):
    """The score of the second epoch, which is not better, is in no checkpoint: it is evaluated again."""
    monkeypatch.setattr(toy, 'SCORES', [3.0, 2.0, 1.0, 0.0])
    stop = [dict(type='EarlyStoppingHook', monitor='score', rule='greater', patience=2)]
    whole = toy.runner(tmp_path / 'whole', custom_hooks=stop)
    whole.train()
    toy.runner(tmp_path / 'part', 2, custom_hooks=stop).train()
    resumed = toy.runner(tmp_path / 'part', resume_from=tmp_path / 'part' / 'epoch_2.pth', custom_hooks=stop)
    toy.Score.epoch = 1
    resumed.train()
    assert resumed.epoch == whole.epoch == 3


def test_settings_that_a_resumed_training_does_not_use_are_told(tmp_path):
    toy.runner(tmp_path, 2).train()
    last = dict(resume_from=tmp_path / 'epoch_2.pth', log_level='WARNING')
    resumed = toy.runner(tmp_path, 2, **last, cfg=dict(randomness=dict(seed=5)))
    resumed.train()
    text = (Path(resumed.log_dir) / f'{resumed.timestamp}.log').read_text()
    assert 'randomness.seed 5 is not used' in text and 'the checkpoint has done 2 of 2' in text
    resumed = toy.runner(tmp_path, 3, **last)
    resumed.optim_wrapper = dict(resumed.optim_wrapper, paramwise_cfg=dict(custom_keys=dict(bias=dict(lr_mult=0.5))))
    explain_resume_errors(resumed)
    with pytest.raises(InputError, match='paramwise_cfg .*load_from=FILE'):
        resumed.train()
