"""Training, evaluation, prediction, export and conditioning on a simulated GPU, in half precision and in float32."""

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
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from benchmarks.gpu import MORE
from research.scenes import Figures, write_crops
from spec_mmdet import ops
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.conditioning import condition
from spec_mmdet.configs import find_config, read_config
from spec_mmdet.data.shapes import write_split
from spec_mmdet.models.xcit import ARCHS, SpecXCiT
from spec_mmdet.training import gpu_checks
from spec_mmdet.training.speed import make_objects

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('simulated_gpu')]
HALF = {'fp16': torch.float16, 'bf16': torch.bfloat16}
ARCH = dict(dim=32, depth=4, num_heads=4)
TINY = f"""
_base_ = {str(CONFIG)!r}
model = dict(backbone=dict(arch=dict(dim=32, depth=4), patch_size=16), neck=dict(in_channels=[32] * 4))
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, begin=0, end=4)]
default_hooks = dict(logger=dict(interval=1), results=None)
"""
# Settings of the trained detector: they are used together, because each training takes seconds.
ALL = """
_base_ = 'tiny.py'
model = dict(backbone=dict(
    with_cp=True, frozen_stages=1, conditioning=dict(_delete_=True, type='svd'),
    init_cfg=dict(type='Pretrained', checkpoint={backbone!r}),
))
optim_wrapper = dict({optim}, accumulative_counts=2)
default_hooks = dict(
    ema=dict(type='EMAHook', momentum=0.1), checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=-1)
)
"""
PRETRAIN = f"""
_base_ = {str(find_config('pretrain_xcit_nano_12_p16'))!r}
model = dict(backbone=dict(arch=dict(_delete_=True, **{ARCH})))
train_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1), results=None)
"""


@pytest.fixture(scope='module')
def simulated_gpu() -> None:
    """Skip where the simulation does not hold, as without a PyTorch built with CUDA."""
    if not os.environ.get('PRETEND_GPU'):
        pytest.skip('no simulated GPU: make test-gpu')  # which has a process of its own
    try:
        pretend_gpu.install()
        pretend_gpu.selftest()
    except Exception as error:
        if os.environ['PRETEND_GPU'] == 'required':
            raise
        pytest.skip(f'no simulated GPU: {error}')


@pytest.fixture(scope='module')
def data(tmp_path_factory, simulated_gpu) -> Path:
    """A folder of images, also for pretraining, and the config of a tiny detector."""
    root = tmp_path_factory.mktemp('data')
    for split, count in dict(train=16, val=8).items():
        write_split(root, split, 4, 64, np.random.default_rng(count))
        write_crops(root / 'crops', split, count, 32, Figures(), np.random.default_rng(count))
    (root / 'tiny.py').write_text(TINY)
    return root


@pytest.fixture(scope='module')
def patch() -> pytest.MonkeyPatch:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def train(patch: pytest.MonkeyPatch, data: Path, work: Path, config: Path, *options: object) -> None:
    arguments = ['--data', data, '--work-dir', work, '--image-size', 64, '--no-check', *options]
    run_tool(patch, 'train', config, *arguments)


@pytest.fixture(scope='module')
def backbone(data, patch) -> Path:
    """A backbone that was pretrained in float16, converted and conditioned."""
    (data / 'pretrain.py').write_text(PRETRAIN)
    sizes = ['--image-size', 32, '--no-check']
    run_tool(patch, 'pretrain', data / 'pretrain.py', '--data', data / 'crops', '--work-dir', data / 'pre', *sizes)
    path = data / 'backbone.pth'
    run_tool(patch, 'convert', data / 'pre' / 'epoch_1.pth', path, '--condition', 'svd')
    return path


def write_config(data: Path, backbone: Path, name: str, optim: str) -> Path:
    """Write a config with the settings ALL and those of an optimiser."""
    path = data / f'{name}.py'
    path.write_text(ALL.format(backbone=str(backbone), optim=optim))
    return path


@pytest.fixture(scope='module')
def trained(patch, data, backbone) -> Path:
    """The work directory of four iterations in float16, with a checkpoint after each; the loss scale grows at steps."""
    scale = "type='AmpOptimWrapper', loss_scale=dict(init_scale=1024.0, growth_interval=1)"
    train(patch, data, data / 'fp16', write_config(data, backbone, 'fp16', scale))
    return data / 'fp16'


def read_log(work: Path) -> list[dict]:
    """Return the lines of the iterations."""
    (log,) = sorted(work.glob('*/vis_data/scalars.json'))[-1:]
    return [line for line in map(json.loads, log.read_text().splitlines()) if 'loss' in line]


def test_losses_in_half_precision_equal_those_of_float32(trained, patch, data, backbone):
    """The proposals that the heads are trained on change with rounding; the losses of the RPN do not."""
    logs = [read_log(trained)]
    for name, optim in dict(bf16="type='AmpOptimWrapper', dtype='bfloat16'", fp32="type='OptimWrapper'").items():
        config = write_config(data, backbone, name, optim)
        nothing = [f'val_{part}=None' for part in ('cfg', 'dataloader', 'evaluator')]
        train(patch, data, data / name, config, '--cfg-options', 'train_cfg.max_epochs=1', *nothing)
        logs.append(read_log(data / name))
    assert [len(log) for log in logs] == [4, 2, 2]
    *halves, expected = logs
    for i, half in enumerate(halves):
        assert half[0]['loss'] != halves[i - 1][0]['loss'] and half[0]['loss'] != expected[0]['loss']
        for name, tolerance in dict(loss=0.1, loss_rpn_cls=0.005, loss_rpn_bbox=0.02).items():
            assert half[0][name] == pytest.approx(expected[0][name], rel=tolerance), name


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


def test_a_training_in_float16_resumes_between_two_steps(trained, patch, data):
    """Weights, their moving average, the optimiser's state, the loss scale and the schedule are bit-identical."""
    work = data / 'resumed'
    shutil.copytree(trained, work)
    (work / 'iter_4.pth').unlink()
    train(patch, data, work, data / 'fp16.py', '--resume')
    whole, resumed, before = (load(path) for path in (trained / 'iter_4.pth', work / 'iter_4.pth', work / 'iter_3.pth'))
    scales = [content['optimizer']['loss_scaler']['scale'] for content in (before, whole)]
    assert scales == [2048.0, 4096.0]
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert_same(whole[part], resumed[part], part)
    assert not torch.equal(*(c['state_dict']['backbone.blocks.3.attn.qkv.weight'] for c in (before, whole)))


def test_frozen_stages_and_corrections_stay_as_they_were(trained, backbone):
    content, given = load(trained / 'iter_4.pth'), load(backbone)
    given = {f'backbone.{name}': value for name, value in given.get('state_dict', given).items()}
    after = content['ema_state_dict']
    moved = {name for name, value in given.items() if not torch.equal(value.cpu(), after[f'module.{name}'].cpu())}
    frozen = ('backbone.patch_embed.', 'backbone.pos_embeder.', 'backbone.blocks.0.')
    assert moved and not any(name.startswith(frozen) or 'correction' in name for name in moved)
    assert {f'backbone.blocks.{i}.attn.qkv.weight' for i in (1, 2, 3)} <= moved


def test_evaluation_prediction_and_export(trained, patch, data, tmp_path, capsys):
    checkpoint = trained / 'iter_4.pth'
    run_tool(patch, 'test', data / 'fp16.py', checkpoint, '--work-dir', tmp_path, '--data', data,
             '--cfg-options', 'test_cfg.fp16=True')  # fmt: skip
    images = [data / 'val', '--score', 0, '--no-pictures', '--out']
    found = {}
    for device in ('cpu', 'cuda'):
        run_tool(patch, 'predict', data / 'fp16.py', checkpoint, *images, tmp_path / device, '--device', device)
        found[device] = json.loads((tmp_path / device / 'predictions.json').read_text())
    assert min(map(len, found.values())) > 20
    assert len(found['cuda']) == pytest.approx(len(found['cpu']), rel=0.05)
    # The scores of so short a training are nearly equal: rounding may swap detections, and which of two overlapping
    # ones is kept.
    ours, theirs = (
        torch.tensor([[1e4 * d['image_id'], 1e4 * d['category_id'], *d['bbox'], d['score']] for d in found[device]])
        for device in ('cuda', 'cpu')
    )
    nearest = torch.cdist(ours, theirs, p=float('inf'), compute_mode='donot_use_mm_for_euclid_dist').amin(1)
    assert (nearest < 2e-3).double().mean() > 0.95
    out = tmp_path / 'backbone.onnx'
    run_tool(patch, 'export', data / 'fp16.py', checkpoint, out, '--backbone')  # compares ONNX Runtime with float64
    assert out.is_file()


class SmallCheck(gpu_checks.GpuCheck):
    """gpu-check at its small size, on a GPU."""

    small = True


@pytest.mark.parametrize('name', sorted((gpu_checks.PARTS | MORE).keys() - {'compiled'}))  # which is not simulated
def test_gpu_check_passes_on_a_correct_gpu_with_tf32(monkeypatch, tmp_path, name):
    monkeypatch.setenv('PRETEND_TF32', '1')
    check, part = SmallCheck('cuda', tmp_path), (gpu_checks.PARTS | MORE)[name][1]
    rows, failed = gpu_checks.run_part(part, check)
    assert rows and not failed
    if name == 'operators':
        assert 'operator convolution' in gpu_checks.run_part(part.__wrapped__, check)[1]


def run_both(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, function) -> list[tuple]:
    """Run a function of model and images on the CPU in float32 and under autocast on the GPU.

    Returns:
        The function's value and the gradients of its loss, of each run.
    """
    results = []
    for device in ('cpu', 'cuda'):
        model.to(device).zero_grad()
        torch.manual_seed(2)
        with torch.autocast(device, dtype, enabled=device == 'cuda'):
            loss, value = function(model, images.to(device))
        scale = 1.0 if device == 'cpu' or loss > 100 else 2.0**10
        (loss * scale).backward()
        gradients = [p.grad.cpu().flatten() / scale for p in model.parameters() if p.grad is not None]
        results.append((value, torch.cat(gradients)))
    return results


@pytest.mark.parametrize('patch_size', [8, 16])
@pytest.mark.parametrize('arch', ARCHS)
def test_features_of_every_arch(arch, patch_size):
    """Widths, heads and eta are the architecture's; four blocks suffice."""
    model = SpecXCiT(dict(ARCHS[arch], depth=4), patch_size, dict(type='identity', lam=1.0))
    dtype = HALF['fp16' if patch_size == 16 else 'bf16']

    def compute(model, images):
        features = [y.float() for y in model(images)]
        return sum((y * y.detach().sign()).mean() for y in features), [y.detach().cpu() for y in features]

    (expected, by_expected), (features, gradients) = run_both(model, torch.randn(1, 3, 64, 64), dtype, compute)
    for own, exact in zip(features, expected, strict=True):
        assert (own - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
    assert torch.cosine_similarity(gradients, by_expected, dim=0) > 0.98


@pytest.mark.parametrize('name', ['xcit_spec_retinanet', 'xcit_spec_fasterrcnn', 'xcit_spec_cascade_maskrcnn'])
def test_losses_and_predictions_of_every_detector(name):
    cfg = read_config(find_config(name)).model
    cfg.backbone.update(arch=ARCH, norm_cfg=dict(type='BN'))
    cfg.neck.in_channels = [32] * len(cfg.neck.in_channels)
    heads, stages = cfg.get('roi_head', {}).get('bbox_head', []), cfg.train_cfg.get('rcnn', [])
    for head in heads if isinstance(heads, list) else [heads]:
        head.fc_out_channels = 64
    for stage in stages if isinstance(stages, list) else [stages]:
        stage.sampler.num = 16
    if 'cascade' in name:
        cfg.roi_head.mask_head.update(num_convs=1, conv_out_channels=32)
    model, samples = MODELS.build(cfg), [make_objects(64, 96, 3) for _ in range(2)]

    def compute(model, images):
        model.train()
        return model.parse_losses(model(images, [sample.to(images.device) for sample in samples], mode='loss'))

    images = torch.randn(2, 3, 64, 96)
    (expected, _), (losses, gradients) = run_both(model, images, torch.float16, compute)
    # Others depend on the random choice of samples, for which a GPU has its own generator.
    compared = {'loss_rpn_bbox': 0.05, 'loss_rpn_cls': 0.05} if 'retinanet' not in name else {'loss': 0.01}
    for key, tolerance in compared.items():
        assert losses[key].item() == pytest.approx(expected[key].item(), rel=tolerance), key
    assert gradients.isfinite().all() and gradients.norm() > 0
    with torch.no_grad(), torch.autocast('cuda', torch.float16):
        for sample in model.eval()(images.cuda(), [sample.to('cuda') for sample in samples], mode='predict'):
            assert sample.pred_instances.bboxes.is_cuda and sample.pred_instances.bboxes.isfinite().all()


@pytest.mark.parametrize('form', ['identity', 'svd'])
def test_a_conditioned_model_on_the_gpu(form):
    """Weight decay acts on W alone, and a step that overflows changes nothing."""
    model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    W = model.self_attn.in_proj_weight.detach().clone()
    corrections = condition(model, form).corrections  # takes the simulated GPU's kind of tensor for a quantised one
    weight = model.cuda().self_attn.in_proj_weight
    C = weight.detach().cpu() - W
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, fused=True)
    corrections.keep_fixed(optimizer)
    scaler = torch.amp.GradScaler('cuda', init_scale=4.0)
    before = weight.detach().clone()
    for value in (torch.inf, 0.0):
        scaler.scale(torch.ones((), device='cuda'))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        scaler.step(optimizer)
        scaler.update()
        if value:
            torch.testing.assert_close(weight, before, rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.detach().cpu(), C + 0.95 * W, rtol=0, atol=1e-6)


def make_operators(dtype: torch.dtype) -> dict:
    """Return functions of tensors that call mmcv's operators, and their arguments."""
    corners = 60 * torch.rand(50, 2)
    regions = torch.cat([torch.zeros(50, 1), corners, corners + 1 + 60 * torch.rand(50, 2)], dim=1).to(dtype)
    targets = torch.arange(50) % 8
    x, W, logits = torch.randn(1, 4, 32, 32), torch.randn(4, 4, 3, 3), torch.randn(50, 8)
    offsets, weights, masks = torch.randn(1, 18, 32, 32), torch.rand(1, 9, 32, 32), torch.rand(1, 9, 64, 64)
    queries = torch.rand(1, 5, 2, 1, 3, 2)
    shares = torch.rand(1, 5, 2, 1, 3)

    def attend(values, queries, shares):
        shapes, start = (torch.tensor(numbers, device=values.device) for numbers in ([[8, 8]], [0]))
        return MultiScaleDeformableAttnFunction.apply(values, shapes, start, queries, shares, 64)

    return {
        'RoIAlign': (lambda x: mmcv.ops.RoIAlign(7, 0.25, 0)(x, regions.to(x)), [x]),
        'focal loss': (
            lambda x: mmcv.ops.sigmoid_focal_loss(x, targets.to(x.device), 2.0, 0.25, None, 'none'), [logits]),
        'deformable convolution': (lambda x, o, W: mmcv.ops.deform_conv2d(x, o, W, 1, 1), [x, offsets, W]),
        'modulated': (
            lambda x, o, m, W: mmcv.ops.modulated_deform_conv2d(x, o, m, W, None, 1, 1, 1, 1, 1),
            [x, offsets, weights, W]),
        'deformable attention': (attend, [torch.randn(1, 64, 2, 4), queries, shares]),
        'CARAFE': (lambda x, m: mmcv.ops.carafe(x, m, 3, 1, 2), [x, masks]),
    }  # fmt: skip


@pytest.mark.parametrize('dtype', HALF.values(), ids=HALF)
def test_operators_in_half_precision(dtype):
    for name, (function, given) in make_operators(dtype).items():
        exact = [tensor.to(dtype).float().requires_grad_() for tensor in given]
        own = [tensor.detach().to(dtype).cuda().requires_grad_() for tensor in exact]
        expected, y = function(*exact), function(*own)
        expected.sum().backward()
        y.float().sum().backward()
        for half, single in ((y, expected), *((a.grad, b.grad) for a, b in zip(own, exact))):
            assert half.dtype == dtype and half.is_cuda, name
            assert (half.cpu().float() - single).abs().max() <= 4 * torch.finfo(dtype).eps * single.abs().max(), name
    corners = 60 * torch.rand(50, 2)
    boxes, scores = torch.cat([corners, corners + 1 + 60 * torch.rand(50, 2)], dim=1).to(dtype), torch.rand(50)
    kept = [mmcv.ops.nms(b, scores.to(b), 0.5)[1].tolist() for b in (boxes, boxes.cuda())]
    assert kept[0] == kept[1] and len(kept[0]) > 5


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
    settings += ['default_hooks.count.type=CountSyncs', 'default_hooks.conditioning=None']
    with pretend_gpu.count_syncs():
        train(patch, data, tmp_path / 'ours', data / 'tiny.py', '--cfg-options', *settings)
    ours, own = CountSyncs.counts[-1], Config.fromfile(tmp_path / 'ours' / 'tiny.py')

    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.model.backbone.init_cfg = None
    cfg.model.roi_head.bbox_head.update(num_classes=4, fc_out_channels=64)  # sizes do not change the number
    cfg.model.roi_head.mask_head.update(num_classes=4, conv_out_channels=32)
    cfg.model.train_cfg.rcnn.sampler.num = own.model.train_cfg.rcnn.sampler.num
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


def test_two_processes_under_the_rules_of_nccl(data, tmp_path):
    command = [sys.executable, Path(__file__).with_name('nccl.py'), data, tmp_path]
    paths = os.pathsep.join(str(ROOT / path) for path in ('tests/bare', '.', 'tests', 'tests/training'))
    env = {**os.environ, 'PYTHONPATH': paths, 'CUDA_VISIBLE_DEVICES': '0,1'}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == [143, 143], ended.stdout
    content = load(tmp_path / 'work' / 'interrupted.pth')
    assert content['meta']['iter'] == 4
    printed, silent = (path.read_text() for path in sorted(tmp_path.glob('says_*.log')))
    assert 'epoch 1/2' in printed and 'box AP' in printed and 'scheduler.step' not in printed + silent
