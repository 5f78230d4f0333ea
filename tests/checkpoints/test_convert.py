"""Convert and load checkpoints of other packages' models: the features must equal those of the original model."""

import argparse
import copy
import hashlib
import pickle
import random
from collections import OrderedDict

import conftest
import pytest
import timm
import torch
from conftest import ROOT, run_tool
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MMLogger
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.xcit import Xcit
from torch import nn
from torch.nn.utils import parametrize

from spec_mmdet import InputError, SpecXCiT
from spec_mmdet.checkpoints.layouts import recognise
from spec_mmdet.checkpoints.pretrained import load_backbone
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.conditioning import Correction, find_projections
from spec_mmdet.models.classifier import SpecXCiTClassifier

CONDITIONINGS = [None, dict(type='identity', lam=3.0), dict(type='identity', sigmas=2.0), dict(type='svd')]
IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SMALL = dict(dim=32, depth=6, num_heads=4)


def convert(*args) -> None:
    """Run tools/convert_checkpoint.py in this process."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, 'convert', *args)


def complaint(*args) -> str:
    """Return the one line of the command's error."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return conftest.error_line(monkeypatch, 'convert', *args)


def randomise(model: nn.Module) -> nn.Module:
    """Give every weight and statistic distinct values, so that exchanged tensors are noticed."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith('.lam'):
            scale = 0.5 if 'gamma' in name else 0.2
            tensor.copy_(
                torch.rand_like(tensor) + 0.5 if 'var' in name or 'temp' in name else scale * torch.randn_like(tensor)
            )
    model.double()
    model.eval()  # mmpretrain's init_weights returns None
    return model


def correct(model: nn.Module, **conditioning) -> None:
    """Condition a third-party model by parametrizations of its layers, with W and C stored apart."""
    for projection in list(find_projections(model)):
        correction = Correction(projection.weight, **conditioning, rows=projection.rows)
        parametrize.register_parametrization(projection.module, projection.tensor, correction)


def timm_model(patch_size: int = 16, conditioning: dict | None = None, **dims) -> nn.Module:
    dims = dict(embed_dim=32, depth=6, num_heads=4) | dims
    model = randomise(Xcit(patch_size=patch_size, eta=1.0, tokens_norm=True, num_classes=7, **dims))
    if conditioning:
        correct(model, **conditioning)
    return model


def block_outputs(model: nn.Module, blocks: nn.ModuleList) -> list[torch.Tensor]:
    """Return the maps of a model's own blocks, after the same blocks as SpecXCiT's taps."""
    outputs = []
    handles = [block.register_forward_hook(lambda m, args, out: outputs.append(out)) for block in blocks]
    with torch.no_grad():
        model(IMAGE)
    for handle in handles:
        handle.remove()
    tokens = outputs[0].shape[1]
    h = round((tokens * 64 / 96) ** 0.5)
    return [outputs[i].transpose(1, 2).unflatten(2, (h, -1)) for i in (1, 2, 3, 5)]


def assert_features(path, expected, patch_size=16, conditioning=None, arch=SMALL):
    model = SpecXCiT(arch, patch_size, conditioning).double().eval()
    load_backbone(model, path)
    with torch.no_grad():
        for ours, theirs in zip(model.compute_tokens(IMAGE), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def reference_names(weights: dict) -> dict:
    """Rename timm's weights to those of facebookresearch/xcit, whose class attention has one fused qkv."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace('pos_embed.', 'pos_embeder.')
        if '.attn.k' in name and name.startswith('cls_attn') or '.attn.v.' in name:
            continue
        if name.startswith('cls_attn') and '.attn.q.' in name and 'parametrizations' not in name:
            value = torch.cat([weights[name.replace('.q.', f'.{part}.')] for part in 'qkv'])
            name = name.replace('.q.', '.qkv.')
        renamed[name] = value
    return renamed


def reference_file(weights: dict) -> dict:
    args = argparse.Namespace(model='xcit', lr=5e-4, data_set='IMNET', resume='', epochs=400, distributed=True)
    return dict(model=reference_names(weights), optimizer=dict(state={}), lr_scheduler={}, epoch=399, args=args)


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
@pytest.mark.parametrize('patch_size', [8, 16])
@pytest.mark.parametrize('layout', ['timm .pth', 'timm .bin', 'timm .safetensors', 'reference'])
def test_features_equal_those_of_the_source_model(tmp_path, layout, patch_size, conditioning):
    model = timm_model(patch_size)
    if conditioning and layout == 'reference':
        # As in a reference-style model: without the class attention, whose layers are fused there.
        correct(model.blocks, **conditioning)
    elif conditioning:
        correct(model, **conditioning)
    expected = block_outputs(model, model.blocks)
    source = tmp_path / f'source{layout.removeprefix("timm ") if layout != "reference" else ".pth"}'
    if layout == 'timm .safetensors':
        save_file(model.state_dict(), source)
    else:
        torch.save(reference_file(model.state_dict()) if layout == 'reference' else model.state_dict(), source)
    convert(source, tmp_path / 'converted.pth')
    assert_features(tmp_path / 'converted.pth', expected, patch_size, conditioning)
    assert_features(source, expected, patch_size, conditioning)  # converted while loading


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
@pytest.mark.parametrize('patch_size', [8, 16])
def test_features_equal_those_of_mmpretrain(tmp_path, patch_size, conditioning):
    pytest.importorskip('mmpretrain', reason='mmpretrain is not installed; its maintained fork is for make test-onedl')
    from mmpretrain.models.backbones import XCiT

    dims = dict(embed_dims=32, depth=6, num_heads=4, qkv_bias=True, layer_scale_init_value=1.0, tokens_norm=True)
    model = randomise(XCiT(patch_size=patch_size, **dims))
    # Every implementation computes the encoding in float32; mmpretrain also its projection's input.
    model.pos_embed.token_projection.register_forward_pre_hook(lambda module, args: args[0].double())
    classifier = nn.Module()
    classifier.backbone, classifier.head = model, nn.Module()
    classifier.head.layers = nn.Sequential(OrderedDict(head=nn.Linear(32, 7).double()))
    if conditioning:
        correct(classifier, **conditioning)
    expected = block_outputs(model, model.xca_layers)
    torch.save(dict(state_dict=classifier.state_dict(), meta=dict(epoch=3)), tmp_path / 'source.pth')
    convert(tmp_path / 'source.pth', tmp_path / 'converted.pth')
    assert_features(tmp_path / 'converted.pth', expected, patch_size, conditioning)

    convert(tmp_path / 'source.pth', tmp_path / 'timm.pth', '--to', 'timm')
    inside_timm = timm_model(patch_size, conditioning)
    inside_timm.load_state_dict(load(tmp_path / 'timm.pth')['state_dict'])
    with torch.no_grad():
        logits = classifier.head.layers(model(IMAGE)[-1])
        torch.testing.assert_close(inside_timm(IMAGE), logits, rtol=0, atol=1e-9)


def test_every_named_architecture_is_recognised():
    for name in ('nano_12_p16', 'tiny_12_p8', 'tiny_24_p8', 'small_12_p16', 'medium_24_p8', 'large_24_p16'):
        with torch.device('meta'):
            model = timm.create_model(f'xcit_{name}_224')
        weights = {k: torch.empty_like(v, device='cpu').fill_(1) for k, v in model.state_dict().items()}
        found = recognise(weights, name)
        assert f'{found.arch}_p{found.patch_size}' == name


def test_wrappers(tmp_path, capsys):
    good, other = timm_model().state_dict(), timm_model().state_dict()
    headless = {k: v for k, v in reference_names(good).items() if not k.startswith('head')}
    dino = {f'backbone.{k}': v for k, v in headless.items()} | {'head.mlp.0.weight': torch.ones(8, 32)}
    reference = reference_file(other)
    for checkpoint, key in (
        (reference_file(good), 'model'),
        (dict(reference, model_ema=reference_names(good)), 'model_ema'),
        (dict(teacher=dino, student={f'module.{k}': torch.zeros_like(v) for k, v in dino.items()}), 'teacher'),
        (dict(state_dict={f'module.{k}': v for k, v in good.items()}), 'state_dict'),
        (dict(state_dict={f'backbone.{k}': v for k, v in good.items()}), 'state_dict'),
        *(
            (dict(state_dict={f'{p}{k}': v for k, v in good.items()} | extra), 'state_dict')
            for p, extra in (
                ('model.', {'loss.weight': torch.ones(7)}),  # of Lightning
                ('model.backbone.', {'model.head.weight': torch.ones(7, 32)}),
                ('_orig_mod.module.', {}),
                ('net._orig_mod.encoder.', {'net._orig_mod.projector.weight': torch.ones(8, 8)}),
                ('teacher.backbone.', {f'student.backbone.{k}': torch.zeros_like(v) for k, v in good.items()}),
                ('student.', {f'queue.{i}': torch.ones(3) for i in range(2)}),
                ('ema_model.module.', {f'model.{k}': torch.zeros_like(v) for k, v in good.items()}),
                ('module.', {'n_averaged': torch.tensor(3)}),
            )
        ),
    ):
        torch.save(checkpoint, tmp_path / 'source.pth')
        convert(tmp_path / 'source.pth', tmp_path / 'converted.pth')
        assert f'under {key!r}' in capsys.readouterr().out
        converted = load(tmp_path / 'converted.pth')['state_dict']
        assert torch.equal(converted['blocks.3.attn.proj.weight'], good['blocks.3.attn.proj.weight'])
    torch.save(dict(reference, model_ema=reference_names(good)), tmp_path / 'source.pth')
    convert(tmp_path / 'source.pth', tmp_path / 'converted.pth', '--key', 'model')
    converted = load(tmp_path / 'converted.pth')['state_dict']
    assert torch.equal(converted['blocks.3.attn.proj.weight'], other['blocks.3.attn.proj.weight'])
    assert 'no weights under' in complaint(tmp_path / 'source.pth', tmp_path / 'x.pth', '--key', 'teacher')


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_round_trips_are_bit_equal(tmp_path, conditioning):
    ours = SpecXCiT(SMALL, conditioning=conditioning)
    for name, tensor in ours.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(('lam', 'sigmas')):
            tensor.copy_(torch.randn_like(tensor))
    torch.save(dict(state_dict=ours.state_dict()), tmp_path / 'ours.pth')
    for layout, ending in (('reference', 'pth'), ('timm', 'pth'), ('timm', 'safetensors')):
        convert(tmp_path / 'ours.pth', tmp_path / f'out.{ending}', '--to', layout)
        convert(tmp_path / f'out.{ending}', tmp_path / 'back.pth')
        back = load(tmp_path / 'back.pth')['state_dict']
        kept = {k: v for k, v in ours.state_dict().items() if layout == 'reference' or not k.startswith('fpn')}
        assert back.keys() == kept.keys()
        assert all(torch.equal(value, back[key]) and value.dtype == back[key].dtype for key, value in kept.items())

    # The layout for timm has the names of timm's own model, conditioned if needed.
    theirs = timm_model(conditioning=conditioning)
    torch.save(theirs.state_dict(), tmp_path / 'timm.pth')
    convert(tmp_path / 'timm.pth', tmp_path / 'ours.pth')
    convert(tmp_path / 'ours.pth', tmp_path / 'backbone.pth', '--to', 'timm')
    convert(tmp_path / 'timm.pth', tmp_path / 'classifier.pth', '--to', 'timm')
    for file, parts in (('backbone', ('patch_embed', 'pos_embed', 'blocks')), ('classifier', ('',))):
        again = load(tmp_path / f'{file}.pth')['state_dict']
        expected = {k: v for k, v in theirs.state_dict().items() if k.startswith(parts)}
        assert again.keys() == expected.keys() and all(torch.equal(v, again[k]) for k, v in expected.items())


@pytest.mark.parametrize('conditioning', CONDITIONINGS[:2])
def test_a_pretrained_classifier_has_equal_logits_in_timm_and_the_reference(tmp_path, conditioning):
    ours = SpecXCiTClassifier(7, SMALL, conditioning=conditioning).double()
    randomise(ours)
    torch.save(dict(state_dict={f'backbone.{k}': v for k, v in ours.state_dict().items()}), tmp_path / 'ours.pth')
    with torch.no_grad():
        expected = ours(IMAGE)

    convert(tmp_path / 'ours.pth', tmp_path / 'timm.pth', '--to', 'timm', *(['--fold'] if conditioning else []))
    model = timm_model()
    model.load_state_dict(load(tmp_path / 'timm.pth')['state_dict'])
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGE), expected, rtol=0, atol=1e-9)

    convert(tmp_path / 'timm.pth', tmp_path / 'reference.pth', '--to', 'reference')
    reference = SpecXCiTClassifier(7, SMALL).double().eval()  # it has the reference's names
    reference.load_state_dict(load(tmp_path / 'reference.pth')['model'])
    with torch.no_grad():
        torch.testing.assert_close(reference(IMAGE), expected, rtol=0, atol=1e-9)


def test_conditioned_class_attention_is_converted_only_folded(tmp_path):
    model = timm_model(conditioning=dict(lam=3.0))
    torch.save(model.state_dict(), tmp_path / 'timm.pth')
    arguments = tmp_path / 'timm.pth', tmp_path / 'reference.pth', '--to', 'reference'
    assert '--fold' in complaint(*arguments)
    convert(*arguments, '--fold')
    reference = SpecXCiTClassifier(7, SMALL).double().eval()
    reference.load_state_dict(load(tmp_path / 'reference.pth')['model'])
    with torch.no_grad():
        torch.testing.assert_close(reference(IMAGE), model(IMAGE), rtol=0, atol=1e-9)


@pytest.mark.parametrize('conditioning', CONDITIONINGS[1:] + [dict(lam=3.0, per_head=True), dict(per_head=True)])
def test_folding(tmp_path, conditioning):
    model = timm_model(conditioning=conditioning)
    expected = block_outputs(model, model.blocks)
    torch.save(model.state_dict(), tmp_path / 'source.pth')
    convert(tmp_path / 'source.pth', tmp_path / 'folded.safetensors', '--fold')
    assert_features(tmp_path / 'folded.safetensors', expected)


@pytest.mark.parametrize('conditioning', CONDITIONINGS[1:])
def test_conditioning_a_plain_checkpoint_keeps_its_function(tmp_path, conditioning):
    model = timm_model()
    expected = block_outputs(model, model.blocks)
    torch.save(model.state_dict(), tmp_path / 'source.pth')
    lam = [word for key, value in conditioning.items() if key != 'type' for word in (f'--{key}', value)]
    convert(tmp_path / 'source.pth', tmp_path / 'converted.pth', '--condition', conditioning['type'], *lam)
    assert_features(tmp_path / 'converted.pth', expected, conditioning=conditioning)
    assert 'conditioned already' in complaint(tmp_path / 'converted.pth', tmp_path / 'x.pth', '--condition', 'svd')


def test_a_conditioning_that_must_be_given(tmp_path):
    model = timm_model(conditioning=dict(lam=3.0))
    expected = block_outputs(model, model.blocks)
    weights = {
        k.replace('.parametrizations.weight.original', '.weight'): v
        for k, v in model.state_dict().items()
        if not k.endswith('.lam')
    }
    source = tmp_path / 'source.pth'
    torch.save(weights, source)
    convert(source, tmp_path / 'told.pth', '--conditioning', 'identity', '--lam', '3')
    assert_features(tmp_path / 'told.pth', expected, conditioning=dict(lam=3.0))
    convert(source, tmp_path / 'folded.pth', '--conditioning', 'identity', '--lam', '3', '--fold')
    assert_features(tmp_path / 'folded.pth', expected)
    for arguments in (['svd'], ['identity']):
        refusal = complaint(source, tmp_path / 'x.pth', '--conditioning', *arguments)
        assert 'trained weights' in refusal and '--lam' in refusal
    again = (tmp_path / 'told.pth', tmp_path / 'x.pth', '--conditioning', 'identity')
    assert 'lam=3)' in complaint(*again)


def test_detectors(tmp_path):
    config = ROOT / 'configs' / 'xcit_spec_shapes.py'
    plain = tmp_path / 'plain.py'
    plain.write_text(f'_base_ = {str(config)!r}\nmodel = dict(backbone=dict(conditioning=None))\n')
    detector = MODELS.build(Config.fromfile(plain).model)
    source = tmp_path / 'detector.pth'
    torch.save(dict(state_dict=detector.state_dict(), meta=dict(CLASSES=('a',), mmdet_version='2.11.0')), source)
    convert(source, tmp_path / 'whole.pth', '--detector', plain)
    whole = load(tmp_path / 'whole.pth')['state_dict']
    assert whole.keys() == detector.state_dict().keys()
    convert(source, tmp_path / 'backbone.pth')
    backbone = load(tmp_path / 'backbone.pth')
    assert backbone['state_dict'].keys() == detector.backbone.state_dict().keys()
    assert backbone['meta']['converted']['source'] == 'detector.pth'
    convert(source, tmp_path / 'kept.pth', '--detector', config, '--condition', 'identity', '--lam', '1')
    kept = MODELS.build(Config.fromfile(config).model).eval()
    kept.load_state_dict(load(tmp_path / 'kept.pth')['state_dict'])
    with torch.no_grad():
        for a, b in zip(kept.backbone(IMAGE.float()), detector.eval().backbone(IMAGE.float()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert 'does not fit the detector' in complaint(
        source, tmp_path / 'x.pth', '--detector', ROOT / 'configs/xcit_maskrcnn.py'
    )
    weights = detector.state_dict()
    del weights['neck.fpn_convs.0.conv.weight']
    torch.save(dict(state_dict=weights), source)
    assert '1 missing (neck.fpn_convs.0' in complaint(source, tmp_path / 'x.pth', '--detector', plain)
    assert not (tmp_path / 'x.pth').exists()


def test_a_record_of_the_origin(tmp_path):
    torch.save(timm_model().state_dict(), tmp_path / 'source.pth')
    for ending in ('pth', 'safetensors'):
        convert(tmp_path / 'source.pth', tmp_path / f'converted.{ending}', '--condition', 'svd')
    record = load(tmp_path / 'converted.pth')['meta']['converted']
    assert record['sha256'] == hashlib.sha256((tmp_path / 'source.pth').read_bytes()).hexdigest()
    assert (record['layout'], record['conditioning']) == ('timm', "dict(type='svd')")
    assert safe_open(tmp_path / 'converted.safetensors', 'pt').metadata() == record


def damaged(weights: dict, rng: random.Random) -> tuple[dict, str]:
    """Yield weights with one fault, and the fault's description."""
    weights = dict(weights)
    name = rng.choice([k for k in weights if not k.endswith('num_batches_tracked')])
    value = weights.pop(name)
    fault = rng.choice(['renamed', 'dropped', 'transposed', 'not a number'])
    if fault == 'renamed':
        weights[name + rng.choice('_x')] = value
    elif fault == 'transposed':
        if value.ndim < 2 or value.shape[0] == value.shape[1]:
            return damaged(weights | {name: value}, rng)
        weights[name] = value.transpose(0, 1)
    elif fault == 'not a number':
        weights[name] = value.clone()
        weights[name].view(-1)[rng.randrange(value.numel())] = float('nan')
    return weights, f'{name} {fault}'


@pytest.mark.parametrize('conditioning', CONDITIONINGS)
def test_damaged_checkpoints_are_refused(tmp_path, conditioning):
    rng = random.Random(str(conditioning))
    good = timm_model(conditioning=conditioning).state_dict()
    source, out = tmp_path / 'source.pth', tmp_path / 'out.pth'
    out.write_text('something already there')
    for _ in range(15):
        bad, fault = damaged(good, rng)
        torch.save(bad, source)
        assert 'source.pth' in complaint(source, out), fault
        model = SpecXCiT(SMALL, conditioning=conditioning)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError):
            load_backbone(model, source)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert out.read_text() == 'something already there'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.pth', 'source.pth']


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
def test_truncated_files_are_refused(tmp_path, ending):
    torch.save(timm_model().state_dict(), tmp_path / 'timm.pth')
    convert(tmp_path / 'timm.pth', tmp_path / f'whole.{ending}')
    content = (tmp_path / f'whole.{ending}').read_bytes()
    source, rng = tmp_path / f'source.{ending}', random.Random(0)
    for _ in range(20):
        source.write_bytes(content[: rng.randrange(len(content))])
        assert 'corrupt' in complaint(source, tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('protocol', ['zip', 'old'])
def test_code_in_a_pickle_is_run_only_when_it_is_trusted(tmp_path, protocol):
    source, trace = tmp_path / 'source.pth', tmp_path / 'trace'
    checkpoint = dict(model=timm_model().state_dict(), args=Payload(trace))
    torch.save(checkpoint, source, _use_new_zipfile_serialization=protocol == 'zip')
    assert 'it was not run' in complaint(source, tmp_path / 'out.pth')
    with pytest.raises(InputError, match='it was not run'):
        load_backbone(SpecXCiT(SMALL), source)
    source.with_name('bare.pth').write_bytes(pickle.dumps(Payload(trace)))
    complaint(source.with_name('bare.pth'), tmp_path / 'out.pth')
    assert not trace.exists() and not (tmp_path / 'out.pth').exists()
    convert(source, tmp_path / 'out.pth', '--trust-pickle')
    assert trace.exists()
    load_backbone(SpecXCiT(SMALL), tmp_path / 'out.pth')


def test_other_refusals(tmp_path):
    source = tmp_path / 'source.pth'
    torch.save(timm_model().state_dict(), source)
    for args, says in (
        ((tmp_path / 'absent.pth', 'out.pth'), 'no such file'),
        ((source, tmp_path / 'out.bin'), 'must end in .pth or .safetensors'),
        ((source, source), 'is the source'),
        ((source, tmp_path / 'out.pth', '--lam', '3'), '--lam needs --conditioning'),
    ):
        assert says in complaint(*args)
    for foreign, says in (
        (timm.create_model('resnet18').state_dict(), 'layout of XCiT'),
        (dict(epoch=3), 'no weights'),
        ([1, 2], 'no weights'),
        ({}, 'no weights'),
    ):
        torch.save(foreign, source)
        assert says in complaint(source, tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('strides', [(8, 16, 32), (32,)])
def test_backbones_of_detectors_that_read_fewer_maps(tmp_path, strides):
    own, source = randomise(SpecXCiT(SMALL, out_strides=strides)), tmp_path / 'detector.pth'
    weights = {f'backbone.{name}': value for name, value in own.state_dict().items()}
    torch.save(dict(state_dict=weights | {'bbox_head.gfl_cls.weight': torch.zeros(4)}), source)
    same = SpecXCiT(SMALL, out_strides=strides).double()
    load_backbone(same, source)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in same.state_dict().items())
    assert {*recognise(load(source), 'x').detector} == {'bbox_head.gfl_cls.weight'}
    if strides == (8, 16, 32):
        with pytest.raises(InputError, match='fpn1'):
            load_backbone(SpecXCiT(SMALL), source)


def test_pretrained_backbones_in_a_config_are_loaded_strictly(tmp_path, caplog):
    source = tmp_path / 'source.pth'
    torch.save(timm_model(conditioning=dict(lam=3.0)).float().state_dict(), source)

    def build(**changes):
        init_cfg = dict(type='Pretrained', checkpoint=str(source))
        config = dict(type='SpecXCiT', arch=SMALL, conditioning=dict(type='identity', lam=3.0), init_cfg=init_cfg)
        backbone = MODELS.build(config | changes)
        backbone.init_weights()
        return backbone

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('INFO')
    logger.addHandler(caplog.handler)
    try:
        backbone = build()
    finally:
        logger.removeHandler(caplog.handler)
        logger.setLevel(level)
    assert torch.equal(backbone.blocks[2].attn.proj.weight, load(source)['blocks.2.attn.proj.weight'])
    count = len(backbone.state_dict()) - len([key for key in backbone.state_dict() if key.startswith('fpn')])
    assert f'loaded {count} tensors; initialised, because the checkpoint lacks them: fpn1.0.weight' in caplog.text
    for changes, says in (
        (dict(arch=dict(SMALL, depth=7)), 'does not fit'),
        (dict(patch_size=8), 'does not fit'),
        (dict(arch=dict(SMALL, num_heads=2)), 'does not fit'),
        (dict(conditioning=None), 'made with conditioning'),
        (dict(conditioning=dict(type='svd')), 'made with conditioning'),
    ):
        with pytest.raises(InputError, match=says):
            build(**changes)
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(InputError, match='corrupt'):
        build()
    source.unlink()
    with pytest.raises(InputError, match='no such file'):
        build()
