"""Compare the backbone with timm's XCiT with the same weights, and test what a detector requires of it."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import fuse_conv_bn
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch._dynamo.testing import CompileCounterWithBackend

from spec_mmdet import InputError, SpecXCiT
from spec_mmdet.conditioning import compute_identity_correction, compute_svd_correction
from spec_mmdet.models import xcit

TINY = dict(dim=32, depth=6, num_heads=4)
CONDITIONINGS = [None, dict(type='identity', lam=10.0), dict(type='svd')]


def randomized(model):
    """Move weights away from their initial values, so that a permuted or forgotten one is noticed."""
    for name, tensor in model.named_parameters():
        tensor.data.add_(torch.randn_like(tensor) * (0.3 if 'temperature' in name or 'gamma' in name else 0.05))
    for name, buffer in model.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5)
    return model.double().eval()


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
@pytest.mark.parametrize('patch_size', [8, 16])
def test_taps_equal_timm(patch_size, conditioning):
    theirs = randomized(timm.create_model(f'xcit_nano_12_p{patch_size}_224', pretrained=False))
    weights = {
        k.replace('pos_embed.', 'pos_embeder.'): v.clone()
        for k, v in theirs.state_dict().items()
        if not k.startswith(('cls_', 'norm', 'head'))
    }
    ours = SpecXCiT('nano_12', patch_size).double().eval()
    assert not ours.load_state_dict(weights, strict=False).unexpected_keys
    if conditioning:
        # Our correction is computed from the weights; theirs is added to W here, by the formulas.
        conditioned = SpecXCiT('nano_12', patch_size, conditioning).double().eval()
        for i, block in enumerate(theirs.blocks):
            W = block.attn.qkv.weight.data.unflatten(0, (3, -1))
            C = (
                compute_identity_correction(W, 10.0)
                if conditioning['type'] == 'identity'
                else compute_svd_correction(W)
            )
            W += C
            weights[f'blocks.{i}.attn.correction.' + ('lam' if conditioning['type'] == 'identity' else 'C')] = (
                torch.tensor(10.0) if conditioning['type'] == 'identity' else C.flatten(0, 1)
            )
        assert not conditioned.load_state_dict(weights, strict=False).unexpected_keys
        plain, ours = ours, conditioned
    image = torch.randn(2, 3, 72, 100, dtype=torch.float64)
    with torch.no_grad():
        taps = ours.compute_tokens(image)
        expected = theirs.forward_intermediates(image, indices=[3, 5, 7, 11], intermediates_only=True)
        for ours_i, theirs_i in zip(taps, expected):
            assert (ours_i - theirs_i).norm() / theirs_i.norm() < 1e-10
        if conditioning:
            assert (plain.compute_tokens(image)[-1] - taps[-1]).norm() / taps[-1].norm() > 1e-3


def test_an_mlp_in_chunks_equals_the_mlp_of_all_tokens():
    mlp, x, gamma = xcit.MLP(8).double(), torch.randn(2, 9000, 8, dtype=torch.float64), torch.randn(8).double()
    with torch.no_grad():
        expected = gamma * mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))
        torch.testing.assert_close(mlp(x, gamma), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('patch_size', [8, 16])
def test_levels_are_the_rescaled_taps(patch_size):
    model = randomized(SpecXCiT(TINY, patch_size))
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    taps, levels = model.compute_tokens(image), model(image)
    for level, stride in zip(levels, (4, 8, 16, 32)):
        assert level.shape == (1, 32, 64 // stride, 96 // stride)
    pool = torch.nn.functional.max_pool2d
    if patch_size == 16:
        assert torch.equal(levels[2], taps[2])
        assert torch.equal(levels[3], pool(taps[3], 2))
    else:
        assert torch.equal(levels[1], taps[1])
        assert torch.equal(levels[2], pool(taps[2], 2))
        assert torch.equal(levels[3], pool(taps[3], 4))


@settings(max_examples=25)
@given(st.integers(32, 90), st.integers(32, 90), st.sampled_from([8, 16]))
def test_any_image_size(height, width, patch_size):
    model = SpecXCiT(TINY, patch_size).eval()
    with torch.no_grad():
        levels = model(torch.randn(1, 3, height, width))
    for level, stride in zip(levels, (4, 8, 16, 32)):
        for side, pixels in zip(level.shape[2:], (height, width)):
            # Strides below the patch size repeat complete patches; those above it leave out the last, partial one.
            assert pixels // stride <= side <= (pixels // patch_size + 1) * max(patch_size // stride, 1)
        assert level.isfinite().all()


def test_an_image_below_the_coarsest_stride_is_refused():
    with pytest.raises(ValueError, match='below 32 pixels'):
        SpecXCiT(TINY)(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize('arch', xcit.ARCHS)
def test_default_taps_end_the_stages(arch):
    with torch.device('meta'):
        model = SpecXCiT(arch)
    assert model.out_indices == ((3, 5, 7, 11) if arch.endswith('12') else (7, 11, 15, 23))
    assert model.blocks[0].attn.qkv.weight.shape == (3 * xcit.ARCHS[arch]['dim'], xcit.ARCHS[arch]['dim'])


def test_position_features_are_computed_once_per_shape(monkeypatch):
    model = SpecXCiT(TINY).eval()
    xcit.compute_fourier_features.cache_clear()
    for _ in range(3):
        model(torch.randn(2, 3, 64, 64))
    assert xcit.compute_fourier_features.cache_info().misses == 1


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_checkpointing_changes_nothing_but_memory(conditioning):
    plain = SpecXCiT(TINY, conditioning=conditioning).double()
    checkpointed = copy.deepcopy(plain)
    checkpointed.with_cp = True
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for model in (plain, checkpointed):
        sum(level.square().mean() for level in model(image)).backward()
    for (name, ours), theirs in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(plain.named_buffers(), checkpointed.buffers()):
        if 'num_batches_tracked' not in name:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize('batch', [1, 64])
def test_drop_path_leaves_out_branches_of_images(batch):
    """Each branch adds one to a token, so that the sum shows which were kept, and their scale."""
    block = xcit.Block(8, 2, 1.0, None, 0.25, dict(type='BN'))
    x, added = torch.zeros(batch, 3, 8), []
    for _ in range(4096 // batch):
        y = block.add_residual(x, torch.ones(8), lambda gamma: gamma.expand_as(x))
        assert torch.equal(y, y[:, :1, :1].expand_as(y))
        added += y[:, 0, 0].tolist()
    assert set(added) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(sum(added) / len(added) - 1) < 0.05  # five standard deviations
    assert torch.equal(block.eval().add_residual(x, torch.ones(8), lambda gamma: gamma.expand_as(x)), x + 1)


@pytest.mark.parametrize('stages', [-1, 0, 2, 4])
def test_frozen_stages(stages):
    model = SpecXCiT(TINY, frozen_stages=stages).train()
    frozen_blocks = {-1: 0, 0: 0, 2: 3, 4: 6}[stages]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sum(level.mean() for level in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        frozen = is_frozen(name, stages, frozen_blocks)
        assert (parameter.grad is None) == frozen, name
    for name, buffer in model.named_buffers():
        if 'running_mean' in name:
            assert torch.equal(buffer, before[name]) == is_frozen(name, stages, frozen_blocks), name


def is_frozen(name, stages, frozen_blocks):
    if name.startswith(('patch_embed', 'pos_embeder')):
        return stages >= 0
    return name.startswith('blocks.') and int(name.split('.')[1]) < frozen_blocks


def test_correction_is_a_buffer_in_the_state_dict():
    for conditioning, records in (CONDITIONINGS[1], ['lam']), ({}, ['lam', 'sigmas']), (CONDITIONINGS[2], ['C']):
        model = SpecXCiT(TINY, conditioning=conditioning)
        assert not [name for name, _ in model.named_parameters() if 'correction' in name]
        recorded = [key for key in model.state_dict() if 'correction' in key]
        assert recorded == [f'blocks.{i}.attn.correction.{record}' for i in range(6) for record in records]
        twin = SpecXCiT(TINY, conditioning=conditioning)
        twin.load_state_dict(model.state_dict())
        image = torch.randn(1, 3, 64, 64)
        assert torch.equal(model.eval()(image)[0], twin.eval()(image)[0])


@pytest.mark.parametrize('load', [torch.nn.Module.load_state_dict, mmengine_load_state_dict])
@pytest.mark.parametrize('saved', range(6))
@pytest.mark.parametrize('configured', range(6))
def test_another_conditioning_is_refused(saved, configured, load):
    choices = [*CONDITIONINGS, dict(type='identity', lam=2.0), dict(sigmas=2.0), dict(per_head=True)]
    weights = SpecXCiT(TINY, conditioning=choices[saved]).state_dict()
    model = torch.nn.ModuleDict(dict(backbone=SpecXCiT(TINY, conditioning=choices[configured])))
    weights = {f'backbone.{k}': v for k, v in weights.items()}
    if saved == configured:
        load(model, weights, strict=False)
    else:
        with pytest.raises(InputError, match='made with conditioning='):
            load(model, weights, strict=False)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(arch='small_13'),
        dict(arch=dict(dim=32, depth=6)),
        dict(arch=dict(dim=36, depth=6, num_heads=4)),
        dict(patch_size=4),
        dict(out_indices=(0, 1, 2)),
        dict(out_indices=(0, 2, 1, 3)),
        dict(out_indices=(0, 1, 2, 6)),
        dict(frozen_stages=5),
        dict(conditioning=dict(type='polar')),
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(ValueError):
        SpecXCiT(**{'arch': TINY, **wrong})


def test_registered_and_initialised_from_a_checkpoint(tmp_path):
    torch.save(SpecXCiT(TINY).state_dict(), tmp_path / 'backbone.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    model = MODELS.build(dict(type='SpecXCiT', arch=TINY, norm_cfg=dict(type='SyncBN'), init_cfg=pretrained))
    model.init_weights()
    for key, value in torch.load(tmp_path / 'backbone.pth').items():
        assert torch.equal(model.state_dict()[key], value)
    # MMEngine's initialiser of this name would only log a missing tensor.
    torch.save(dict(list(model.state_dict().items())[:-1]), tmp_path / 'backbone.pth')
    with pytest.raises(InputError, match='fpn2.0.bias'):
        SpecXCiT(TINY, init_cfg=[pretrained]).init_weights()
    assert isinstance(model.blocks[0].local_mp.bn, torch.nn.SyncBatchNorm)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_with_few_compilations():
    counter = CompileCounterWithBackend('aot_eager')
    model = SpecXCiT(TINY, compile=dict(dynamic=True, backend=counter, fullgraph=True)).double()
    plain = SpecXCiT(TINY).double()
    plain.load_state_dict(model.state_dict())
    for size in (64, 96, 128, 160, 192, 224, 256):
        image = torch.randn(1, 3, size, size + 32, dtype=torch.float64)
        for ours, theirs in zip(model(image), plain(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    compilations = counter.frame_count
    sum(f.sum() for f in model(torch.randn(1, 3, 320, 288, dtype=torch.float64))).backward()
    assert counter.frame_count == compilations <= 6  # of six blocks at seven sizes
    assert all(p.grad is not None for p in model.blocks.parameters())


def test_training_after_inference_mode():
    """Autograd accepts the cached position encoding, whoever computed it."""
    xcit.compute_fourier_features.cache_clear()
    model, image = SpecXCiT(TINY), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        model(image)
    model(image)[0].sum().backward()
    assert model.pos_embeder.token_projection.weight.grad.isfinite().all()


@pytest.mark.parametrize('norm_cfg', [dict(type='GN', num_groups=2), dict(type='LN', eps=1e-6), dict(type='BN')])
@pytest.mark.parametrize('with_cp', [False, True])
def test_every_normalisation_trains_and_evaluates(norm_cfg, with_cp):
    model, image = SpecXCiT(TINY, norm_cfg=norm_cfg, with_cp=with_cp), torch.randn(2, 3, 64, 96)
    sum(level.square().mean() for level in model(image)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    if norm_cfg['type'] != 'BN':  # computes the same in both modes
        with torch.no_grad():
            for own, expected in zip(model(image), model.train()(image), strict=True):
                torch.testing.assert_close(own, expected)


def test_layer_norm_is_over_the_channels():
    norm, x = xcit.build_norm(dict(type='LN', eps=0.0), 6), torch.randn(2, 6, 3, 4)
    centred = x - x.mean(dim=1, keepdim=True)
    torch.testing.assert_close(norm(x), centred / centred.square().mean(dim=1, keepdim=True).sqrt())


@pytest.mark.parametrize('arch', [TINY, dict(dim=256, depth=4, num_heads=4)])  # the wide model has a fast stem
def test_fused_batch_normalisation_changes_nothing(arch):
    model = randomized(SpecXCiT(arch))
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        fuse_conv_bn(model)
        assert not isinstance(model.patch_embed.proj['0'][1], torch.nn.BatchNorm2d)
        for own, level in zip(model(image), expected, strict=True):
            torch.testing.assert_close(own, level, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('tokens_per_channel', ['few', 'many'])
def test_an_adapter_equals_its_merged_weights(tokens_per_channel):
    peft = pytest.importorskip('peft')
    model = randomized(SpecXCiT(TINY, conditioning=dict(type='identity', lam=2.0)))
    image = torch.randn(1, 3, *((64, 64) if tokens_per_channel == 'few' else (128, 192)), dtype=torch.float64)
    with torch.no_grad():
        before = model(image)
        lora = peft.LoraConfig(target_modules=['qkv', 'attn.proj', 'fc1', 'fc2'], r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(model, lora).double().eval()
        outputs = adapted(image)
        for own, old in zip(outputs, before):
            assert (own - old).norm() > 1e-3 * old.norm()
    sum(level.square().mean() for level in adapted(image)).backward()
    for name, parameter in adapted.named_parameters():
        assert ('lora_' in name) == (parameter.grad is not None and bool(parameter.grad.any())), name
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        for own, expected in zip(merged(image), outputs, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('evaluation', [True, False])
def test_hooks_fire_on_every_layer_with_weights_and_change_nothing(evaluation):
    model = SpecXCiT(TINY, conditioning=dict(type='svd')).double().train(not evaluation)
    image, seen = torch.randn(1, 3, 64, 64, dtype=torch.float64), {}
    with torch.no_grad():
        expected = model(image)
        for name, module in model.named_modules():
            if not list(module.children()) and list(module.parameters()):
                module.register_forward_hook(lambda module, args, y, name=name: seen.update({name: (y, y.clone())}))
        for own, level in zip(model(image), expected, strict=True):
            torch.testing.assert_close(own, level, rtol=1e-8, atol=1e-8)
    assert {name.rpartition('.')[0] for name, _ in model.named_parameters()} - {''} >= seen.keys()
    assert sum('.qkv' in name or '.proj' in name or '.fc' in name for name in seen) == 4 * 6 + 8
    assert len(seen) == sum(1 for m in model.modules() if not list(m.children()) and list(m.parameters()))
    for name, (kept, copied) in seen.items():
        assert torch.equal(kept, copied), name  # not overwritten after the hook has read it
