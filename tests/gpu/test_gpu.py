"""Training, resuming, evaluation and prediction on a simulated GPU, in half precision and in float32."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mmcv.ops
import numpy as np
import pretend_gpu
import pytest
import torch
from conftest import CONFIG, ROOT, run_tool
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from benchmarks.gpu import check_half_precision
from spec_mmdet import ops
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.data.shapes import write_split
from spec_mmdet.training import gpu_checks

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('simulated_gpu')]
HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}
SMALL = [
    'default_hooks.logger.interval=1',
    'train_dataloader.batch_size=2',
    'train_cfg.max_epochs=2',
    'param_scheduler.0.end=2',
    'model.backbone.arch.depth=4',
    'model.backbone.patch_size=16',
]


@pytest.fixture(scope='module')
def simulated_gpu() -> None:
    """Skip where the simulation does not hold, as without a PyTorch built with CUDA."""
    if not os.environ.get('PRETEND_GPU'):
        pytest.skip('no simulated GPU: make test-gpu')  # which has a process of its own
    try:
        pretend_gpu.install()
        pretend_gpu.selftest()
    except Exception as error:
        pytest.skip(f'no simulated GPU: {error}')


@pytest.fixture(scope='module')
def data(tmp_path_factory, simulated_gpu) -> Path:
    root = tmp_path_factory.mktemp('data')
    for split in ('train', 'val'):
        write_split(root, split, 4, 64, np.random.default_rng(len(split)))
    return root


@pytest.fixture(scope='module')
def patch() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def train(patch: pytest.MonkeyPatch, data: Path, work: Path, *settings: str, options: tuple[str, ...] = ()) -> dict:
    """Run two epochs of two iterations; return the last checkpoint."""
    arguments = ['--data', data, '--work-dir', work, '--image-size', 64, '--no-check', *options, '--cfg-options']
    run_tool(patch, 'train', CONFIG, *arguments, *SMALL, *settings)
    return load(work / 'epoch_2.pth')


def read_log(work: Path) -> list[dict]:
    """Return the lines of the iterations."""
    (log,) = sorted(work.glob('*/vis_data/scalars.json'))[-1:]
    return [line for line in map(json.loads, log.read_text().splitlines()) if 'loss' in line]


@pytest.fixture(scope='module')
def trained(tmp_path_factory, patch, data) -> Path:
    """The work directory of a training in float16."""
    work = tmp_path_factory.mktemp('fp16')
    train(patch, data, work, options=('--amp',))
    return work


def test_losses_in_half_precision_equal_those_of_float32(trained, patch, data, tmp_path):
    """The proposals that the heads are trained on change with rounding; the losses of the RPN do not."""
    train(patch, data, tmp_path / 'fp32')
    train(patch, data, tmp_path / 'bf16', 'optim_wrapper.dtype=bfloat16', options=('--amp',))
    expected = read_log(tmp_path / 'fp32')
    assert len(expected) == 4
    for work in (trained, tmp_path / 'bf16'):
        first = read_log(work)[0]
        for name, tolerance in dict(loss=0.1, loss_rpn_cls=0.005, loss_rpn_bbox=0.02).items():
            assert first[name] == pytest.approx(expected[0][name], rel=tolerance), name


def assert_same(one: object, other: object, name: str = '') -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one.cpu(), other.cpu()), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_same(one[key], other[key], f'{name}.{key}')
    elif isinstance(one, list | tuple):
        for i, values in enumerate(zip(one, other, strict=True)):
            assert_same(*values, f'{name}.{i}')
    else:
        assert one == other, name


def test_a_resumed_training_in_float16_is_the_same(trained, patch, data, tmp_path):
    shutil.copytree(trained, tmp_path / 'resumed')
    (tmp_path / 'resumed' / 'epoch_2.pth').unlink()
    resumed = train(patch, data, tmp_path / 'resumed', options=('--amp', '--resume'))
    whole = load(trained / 'epoch_2.pth')
    assert whole['optimizer']['loss_scaler']['scale'] > 0
    for part in ('state_dict', 'optimizer'):
        assert_same(whole[part], resumed[part], part)


def test_evaluation_and_prediction(trained, patch, data, tmp_path, capsys):
    run_tool(patch, 'test', CONFIG, trained / 'epoch_2.pth', '--work-dir', tmp_path, '--data', data,
             '--cfg-options', *SMALL)  # fmt: skip
    run_tool(patch, 'predict', CONFIG, trained / 'epoch_2.pth', data / 'val', '--score', 0, '--no-pictures',
             '--out', tmp_path / 'out', '--cfg-options', *SMALL)  # fmt: skip
    assert json.loads((tmp_path / 'out' / 'predictions.json').read_text())


class SmallCheck(gpu_checks.GpuCheck):
    """gpu-check at its small size, on a GPU."""

    small = True


def test_gpu_check_passes_on_a_correct_gpu_with_tf32(monkeypatch, tmp_path):
    monkeypatch.setenv('PRETEND_TF32', '1')
    check = SmallCheck('cuda', tmp_path)
    for part in (gpu_checks.check_operators, check_half_precision, gpu_checks.check_training_steps):
        rows, failed = gpu_checks.run_part(part, check)
        assert rows and not failed, part
    assert 'operator convolution' in gpu_checks.run_part(gpu_checks.check_operators.__wrapped__, check)[1]


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_operators_in_half_precision(dtype):
    corners = 60 * torch.rand(50, 2)
    boxes, scores = (
        torch.cat([corners, corners + 1 + 60 * torch.rand(50, 2)], dim=1).to(dtype),
        torch.rand(50).to(dtype),
    )
    kept = [mmcv.ops.nms(boxes.float().to(d), scores.float().to(d), 0.5)[1].tolist() for d in ('cpu', 'cuda')]
    assert mmcv.ops.nms(boxes.cuda(), scores.cuda(), 0.5)[1].tolist() == kept[0] == kept[1]
    x, logits = torch.randn(1, 4, 32, 32).to(dtype), torch.randn(50, 8).to(dtype)
    regions = torch.cat([torch.zeros(50, 1), boxes.float()], dim=1)
    functions = {
        'RoIAlign': (lambda x: mmcv.ops.RoIAlign(7, 0.25, 0)(x, regions.to(x)), x),
        'focal loss': (lambda x: mmcv.ops.sigmoid_focal_loss(x, (torch.arange(50) % 9).to(x.device), 2.0, 0.25, None,
                                                             'none'), logits),
    }  # fmt: skip
    for name, (function, given) in functions.items():
        exact, own = (v.detach().requires_grad_() for v in (given.float(), given.cuda()))
        expected, y = function(exact), function(own)
        expected.sum().backward()
        y.float().sum().backward()
        for half, single in ((y, expected), (own.grad, exact.grad)):
            assert half.dtype == dtype and half.is_cuda
            assert (half.cpu().float() - single).abs().max() <= 4 * torch.finfo(dtype).eps * single.abs().max(), name


def test_nms_and_the_focal_loss_do_not_wait():
    corners = 60 * torch.rand(50, 2, device='cuda')
    boxes, scores = torch.cat([corners, corners + 10], dim=1), torch.rand(50, device='cuda')
    logits, target = torch.randn(50, 8, device='cuda', requires_grad=True), torch.arange(50, device='cuda') % 9
    with pretend_gpu.count_syncs() as syncs:
        for offset in (0, 1):
            ops.nms(boxes, scores, 0.5, offset)
        mmcv.ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none').sum().backward()
    assert not syncs


@HOOKS.register_module(force=True)
class CountSyncs(Hook):
    """Keep the synchronisations of each iteration, without loading, evaluation and checkpoints."""

    priority = 'LOWEST'

    def before_train(self, runner) -> None:
        CountSyncs.counts = []

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        pretend_gpu.SYNCS.clear()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        CountSyncs.counts.append(Counter(pretend_gpu.SYNCS))


def test_an_iteration_waits_no_more_often_than_mmdetections(patch, data, tmp_path):
    """Each batch contains all images; what depends on their boxes and on chance is not compared."""
    amp = dict(type='AmpOptimWrapper', loss_scale=128.0)
    settings = [f'optim_wrapper.{name}={value}' for name, value in amp.items()] + ['train_dataloader.batch_size=4']
    settings += [f'val_{name}=None' for name in ('cfg', 'dataloader', 'evaluator')]
    with pretend_gpu.count_syncs():
        train(
            patch,
            data,
            tmp_path / 'ours',
            *settings,
            'default_hooks.count.type=CountSyncs',
            'default_hooks.conditioning=None',
        )
    ours, own = CountSyncs.counts[-1], Config.fromfile(tmp_path / 'ours' / CONFIG.name)

    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone.init_cfg = None
    for head in ('bbox_head', 'mask_head'):
        cfg.model.roi_head[head].num_classes = 4
    cfg.train_dataloader = own.train_dataloader
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2)
    for name in ('val', 'test'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{name}_{part}'] = None
    cfg.optim_wrapper = dict(amp, optimizer=dict(type='SGD', lr=1e-4), clip_grad=dict(max_norm=5))
    cfg.default_hooks.count, cfg.work_dir = dict(type='CountSyncs'), str(tmp_path / 'plain')
    with pretend_gpu.count_syncs():
        Runner.from_cfg(cfg).train()
    plain = CountSyncs.counts[-1]
    by_chance = ('max_iou_assigner.py', 'random_sampler.py')
    totals = [
        sum(n for place, n in counts.items() if not any(part in place for part in by_chance))
        for counts in (ours, plain)
    ]
    print('synchronisations, ours and MMDetection:', ours.total(), plain.total(), 'compared:', *totals)
    assert 0 < totals[0] <= totals[1] + 1, ours - plain


def test_two_processes_under_the_rules_of_nccl(tmp_path):
    command = [sys.executable, Path(__file__).with_name('nccl.py'), tmp_path]
    paths = os.pathsep.join(str(ROOT / path) for path in ('tests/bare', '.', 'tests', 'tests/training'))
    env = {**os.environ, 'PYTHONPATH': paths, 'CUDA_VISIBLE_DEVICES': '0,1'}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [143, 143]
    content = load(tmp_path / 'work' / 'interrupted.pth')
    assert content['meta']['iter'] == 8  # after the evaluation of the first epoch
