"""Compare the configs for ADE20K with those of XCiT's authors, and the logits of converted checkpoints with theirs."""

from pathlib import Path

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_tool
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.structures import BaseDataElement
from timm.models.xcit import Xcit
from torch import nn

from spec_mmdet.configs import read_config
from spec_mmdet.models.onnx_segmentor import OnnxSegmentor, pool
from spec_mmdet.models.xcit import ARCHS

pytest.importorskip('mmseg', reason='MMSegmentation is not installed: pip install spec_mmdet[seg]')

# facebookresearch/xcit, semantic_segmentation/configs/xcit: channels, blocks, heads, eta, taps, and the stochastic
# depth of Semantic FPN and of UperNet. Both patch sizes have the same.
FAMILY = {
    'tiny_12': (192, 12, 4, 1.0, (3, 5, 7, 11), 0.0, 0.0),
    'small_12': (384, 12, 8, 1.0, (3, 5, 7, 11), 0.05, 0.05),
    'small_24': (384, 24, 8, 1e-5, (7, 11, 15, 23), 0.1, 0.1),
    'medium_24': (512, 24, 8, 1e-5, (7, 11, 15, 23), 0.2, 0.15),
}
HEADS = ('semanticfpn', 'upernet')


def load(name: str) -> Config:
    return read_config(ROOT / 'configs' / f'{name}.py')


def build(cfg: dict) -> nn.Module:
    init_default_scope('mmseg')
    return revert_sync_batchnorm(MODELS.build(cfg))


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('patch_size', [16, 8])
@pytest.mark.parametrize('arch', FAMILY)
def test_models_and_twins(arch, patch_size, head):
    cfg = load(f'xcit_{arch}_p{patch_size}_{head}')
    dim, depth, heads, eta, taps, *drop_paths = FAMILY[arch]
    with torch.device('meta'):
        model = build(cfg.model)
    backbone, block = model.backbone, model.backbone.blocks[0]
    assert len(block.gamma1) == dim and len(backbone.blocks) == depth and block.attn.num_heads == heads
    assert backbone.out_indices == taps and cfg.model.backbone.patch_size == patch_size
    assert {block.drop_path for block in backbone.blocks} == {drop_paths[HEADS.index(head)]}
    assert ARCHS[arch]['eta'] == eta
    assert (model.decode_head.num_classes, model.decode_head.dropout_ratio, model.align_corners) == (150, 0.1, False)
    if head == 'semanticfpn':
        assert model.neck.out_channels == dim and model.decode_head.feature_strides == [4, 8, 16, 32]
        assert model.decode_head.channels == 128 and not model.with_auxiliary_head
    else:
        assert model.decode_head.channels == 512 and not model.with_neck
        auxiliary = model.auxiliary_head
        assert (auxiliary.num_classes, auxiliary.channels, auxiliary.in_index) == (150, 256, 2)
        assert auxiliary.loss_decode.loss_weight == 0.4
    spec, plain = load(f'xcit_spec_{arch}_p{patch_size}_{head}').to_dict(), cfg.to_dict()
    assert spec['model']['backbone'].pop('conditioning') == dict(type='identity', lam=10.0)
    assert spec == plain


@pytest.mark.parametrize(('head', 'iterations'), [('semanticfpn', 80000), ('upernet', 160000)])
def test_schedule_and_data(head, iterations):
    cfg = load(f'xcit_tiny_12_p16_{head}')
    assert cfg.train_cfg.max_iters == iterations and cfg.train_cfg.val_interval == iterations // 10
    assert cfg.default_hooks.checkpoint.interval == iterations // 10
    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 8 * 2
    assert cfg.model.test_cfg.mode == 'whole' and cfg.model.data_preprocessor.size == (512, 512)
    resize, crop, flip, distortion = cfg.train_dataloader.dataset.pipeline[2:6]
    assert (resize.scale, resize.ratio_range, resize.keep_ratio) == ((2048, 512), (0.5, 2.0), True)
    assert (crop.crop_size, crop.cat_max_ratio, flip.prob) == ((512, 512), 0.75, 0.5)
    assert distortion.type == 'PhotoMetricDistortion'
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (2048, 512)

    # MMSegmentation 0.11: polynomial of power 1 to 0 over all iterations; the first 1500 are scaled from 1e-6 to 1.
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [PARAM_SCHEDULERS.build(dict(cfg_, optimizer=optimizer)) for cfg_ in cfg.param_scheduler]
    for i in range(3000):
        warm_up = min(1, 1 - (1 - i / 1500) * (1 - 1e-6))
        assert optimizer.param_groups[0]['lr'] == pytest.approx(6e-5 * (1 - i / iterations) * warm_up, rel=1e-3)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_only_norms_of_the_blocks_are_not_decayed():
    cfg = load('xcit_tiny_12_p16_upernet')
    model = build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay = {id(group['params'][0]): group['weight_decay'] for group in groups}
    assert {(group['lr'], group['betas']) for group in groups} == {(6e-5, (0.9, 0.999))}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if 'norm' in name else 0.01), name


SMALL = dict(dim=32, depth=6, num_heads=4)
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def randomise(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace weights by distinct values, with positive variances."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: value if not value.is_floating_point()
        else torch.rand(value.shape, generator=generator) + 0.5 if 'var' in name or 'temp' in name
        else torch.randn(value.shape, generator=generator) * 0.2
        for name, value in weights.items()
    }  # fmt: skip


def reference_maps(weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the four maps of the reference's backbone with patch size 16, from timm's blocks and plain functions."""
    blocks = Xcit(patch_size=16, embed_dim=32, depth=6, num_heads=4, eta=1.0, num_classes=0).eval()
    named = {name.replace('pos_embeder.', 'pos_embed.'): value for name, value in weights.items()}
    own = {name: value for name, value in blocks.state_dict().items() if name.startswith(('cls_', 'norm.'))}
    blocks.load_state_dict({name: value for name, value in named.items() if not name.startswith('fpn')} | own)
    outputs = []
    for block in blocks.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    blocks(IMAGE)
    x = [outputs[i].transpose(1, 2).unflatten(2, (4, 6)) for i in (1, 2, 3, 5)]

    def up(x, name):
        return F.conv_transpose2d(x, weights[f'{name}.weight'], weights[f'{name}.bias'], stride=2)

    statistics = [weights[f'fpn1.1.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
    first = up(F.gelu(F.batch_norm(up(x[0], 'fpn1.0'), *statistics)), 'fpn1.3')
    return [first, up(x[1], 'fpn2.0'), x[2], F.max_pool2d(x[3], 2)]


def semantic_fpn(weights: dict[str, torch.Tensor], maps: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits of the reference's FPN and head, computed by plain functions."""

    def conv(x, name, **options):
        return F.conv2d(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'), **options)

    x = [conv(level, f'neck.lateral_convs.{i}.conv') for i, level in enumerate(maps)]
    for i in (2, 1, 0):
        x[i] = x[i] + F.interpolate(x[i + 1], size=x[i].shape[2:])
    x = [conv(level, f'neck.fpn_convs.{i}.conv', padding=1) for i, level in enumerate(x)]
    total = 0
    for i, level in enumerate(x):
        for step in range(max(i, 1)):
            name = f'decode_head.scale_heads.{i}.{2 * step}'
            statistics = [weights[f'{name}.bn.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias')]
            level = F.relu(F.batch_norm(conv(level, f'{name}.conv', padding=1), *statistics))
            if i:
                level = F.interpolate(level, scale_factor=2, mode='bilinear')
        total = total + F.interpolate(level, size=x[0].shape[2:], mode='bilinear')
    return conv(total, 'decode_head.conv_seg')


def write_small(folder: Path, head: str) -> Path:
    """Write the config of a segmentor with few channels and five classes."""
    config = folder / f'{head}.py'
    width = (
        'neck=dict(in_channels=[32] * 4, out_channels=32), '
        if head == 'semanticfpn'
        else 'auxiliary_head=dict(in_channels=32, num_classes=5), '
    )
    config.write_text(
        f'_base_ = {str(ROOT / "configs" / f"xcit_small_12_p16_{head}.py")!r}\n'
        f'model = dict(backbone=dict(arch=dict(_delete_=True, **{SMALL})), {width}'
        'decode_head=dict(in_channels=[32] * 4, channels=16, num_classes=5))\n'
    )
    return config


@pytest.mark.parametrize('head', HEADS)
def test_logits_of_the_authors_segmentors(tmp_path, monkeypatch, head):
    config = write_small(tmp_path, head)
    model = build(read_config(config).model).eval()
    weights = randomise(model.state_dict())
    torch.save(dict(state_dict=weights, meta=dict(mmseg_version='0.11.0'), optimizer={}), tmp_path / 'reference.pth')
    run_tool(monkeypatch, 'convert', tmp_path / 'reference.pth', tmp_path / 'converted.pth', '--detector', config)
    converted = torch.load(tmp_path / 'converted.pth')
    model.load_state_dict(converted['state_dict'])
    with torch.no_grad():
        backbone = {k.removeprefix('backbone.'): v for k, v in weights.items() if k.startswith('backbone.')}
        maps = reference_maps(backbone)
        expected = semantic_fpn(weights, maps) if head == 'semanticfpn' else model.decode_head(maps)
        torch.testing.assert_close(model(IMAGE), expected, rtol=1e-4, atol=1e-4)
    del weights['decode_head.conv_seg.bias']
    torch.save(dict(state_dict=weights), tmp_path / 'reference.pth')
    arguments = (tmp_path / 'reference.pth', tmp_path / 'x.pth', '--detector', config)
    assert 'conv_seg.bias' in conftest.error_line(monkeypatch, 'convert', *arguments)


def test_an_exported_upernet(tmp_path, monkeypatch):
    """Compare the labels of ONNX Runtime with PyTorch's in float64, where these are no ties, on two sizes."""
    pytest.importorskip('onnxruntime')
    config, checkpoint, out = write_small(tmp_path, 'upernet'), tmp_path / 'x.pth', tmp_path / 'x.onnx'
    cfg = read_config(config)
    cfg.model.backbone.arch.depth = 4
    model = build(cfg.model).eval()
    model.load_state_dict(randomise(model.state_dict()))
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((96, 160), (352, 224))]

    def compute_logits(image: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            data = model.data_preprocessor(dict(inputs=[image]))
            maps = model(data['inputs'].to(model.decode_head.conv_seg.bias.dtype))
        return F.interpolate(maps, size=image.shape[1:], mode='bilinear')[0]

    model.decode_head.conv_seg.bias.data -= compute_logits(images[0]).mean(dim=(1, 2))  # so that each class occurs
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=tuple('abcde')))), checkpoint)
    run_tool(monkeypatch, 'export', config, checkpoint, out, '--cfg-options', 'model.backbone.arch.depth=4')
    exported, model = OnnxSegmentor(out, device='cpu'), model.double()
    for image in images:  # with maps of 3 x 5 and 11 x 7 in the pooling
        logits = compute_logits(image)
        first, second = logits.topk(2, dim=0).values
        (found,) = exported.run(image, BaseDataElement(metainfo=dict(ori_shape=image.shape[1:])))
        clear = first - second > 1e-3 * logits.std()
        assert clear.double().mean() > 0.99 and len(logits.argmax(0).unique()) > 3
        assert (found == logits.argmax(0))[clear].all()


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30))
def test_pooling_is_pytorchs(parts, height, width):
    maps = torch.randn(1, 2, height, width)
    torch.testing.assert_close(pool(maps, parts), F.adaptive_avg_pool2d(maps, parts))


def test_the_plain_name_is_found_in_mmsegmentations_registry():
    from mmseg.registry import HOOKS, MODELS

    from spec_mmdet import AtomicCheckpointHook, SpecXCiT

    assert MODELS.get('SpecXCiT') is SpecXCiT and HOOKS.get('AtomicCheckpointHook') is AtomicCheckpointHook
