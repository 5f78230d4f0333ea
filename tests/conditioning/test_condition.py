"""condition and fold on third-party attention, against W + C computed by hand in a copy."""

import copy
import re
import subprocess
import sys
import warnings

import pytest
import timm
import torch
import transformers
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.nn.utils import parametrize

from spec_mmdet import InputError, SpecXCiT
from spec_mmdet.conditioning import Correction, condition, describe_conditioning, fold, measure

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 50, (1, 64), generator=torch.Generator().manual_seed(1))


class SelfAttention(nn.Module):
    """Applies torch.nn.MultiheadAttention to the tokens of a picture."""

    def __init__(self, **widths):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **widths)

    def forward(self, x):
        x = x.reshape(1, -1, 12)
        key = x.reshape(1, -1, self.attention.kdim)
        return self.attention(x, key, key)[0]


def hugging_face(model, config, **settings):
    config = config(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **settings
    )
    return model(config)


# A builder for each family, and its parameters with their number of stacked projections.
FAMILIES = {
    'MultiheadAttention': (SelfAttention, {r'in_proj_weight': 3}),
    'MultiheadAttention, keys of another width': (lambda: SelfAttention(kdim=6, vdim=6), {r'[qkv]_proj_weight': 1}),
    'timm ViT': (
        lambda: timm.create_model('vit_tiny_patch16_224', img_size=64, depth=3, num_classes=5),
        {r'blocks\.\d\.attn\.qkv\.weight': 3},
    ),
    'timm DeiT': (
        lambda: timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, depth=3, num_classes=5),
        {r'blocks\.\d\.attn\.qkv\.weight': 3},
    ),
    'timm Swin': (
        lambda: timm.create_model(
            'swin_tiny_patch4_window7_224', img_size=64, window_size=4, depths=(1, 1, 2, 1), embed_dim=24, num_classes=5
        ),
        {r'attn\.qkv\.weight': 3},
    ),
    'timm XCiT': (
        lambda: timm.create_model('xcit_nano_12_p16_224', depth=3, num_classes=5),
        {r'^blocks\.\d\.attn\.qkv\.weight': 3, r'cls_attn_blocks\.\d\.attn\.[qkv]\.weight': 1},
    ),
    'timm CaiT': (
        lambda: timm.create_model('cait_xxs24_224', img_size=64, depth=2, num_classes=5, init_values=1.0),
        {r'^blocks\.\d\.attn\.qkv\.weight': 3, r'blocks_token_only\.\d\.attn\.[qkv]\.weight': 1},
    ),
    'Hugging Face BERT': (
        lambda: hugging_face(transformers.BertModel, transformers.BertConfig),
        {r'self\.(query|key|value)\.weight': 1},
    ),
    'Hugging Face Nystroemformer': (
        lambda: hugging_face(
            transformers.NystromformerModel, transformers.NystromformerConfig, segment_means_seq_len=64, num_landmarks=8
        ),
        {r'self\.(query|key|value)\.weight': 1},
    ),
    'SpecXCiT': (
        lambda: SpecXCiT(dict(dim=32, depth=6, num_heads=4)),
        {r'blocks\.\d\.attn\.qkv\.weight': 3},
    ),
}


def output(model):
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            return model(TOKENS).last_hidden_state
        out = model(IMAGE.to(next(model.parameters()).dtype))
        return out[-1] if isinstance(out, tuple) else out


def with_correction_by_hand(plain, weights, correction):
    """Return a copy of a model with C added to each of its stacked projections, and the number of projections."""
    model, count = copy.deepcopy(plain), 0
    for name, parameter in model.named_parameters():
        for pattern, blocks in weights.items():
            if re.search(pattern, name):
                for W in parameter.data.chunk(blocks):
                    W += correction(W)
                    count += 1
    return model, count


def polar(W):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return S[0] * U @ Vh


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('form', ['identity', 'svd'])
def test_condition(family, form):
    build, weights = FAMILIES[family]
    plain = build().double().eval()
    expected, count = with_correction_by_hand(
        plain, weights, (lambda W: 10 * torch.eye(*W.shape).double()) if form == 'identity' else polar
    )
    model = copy.deepcopy(plain)
    report = condition(model, form, lam=10.0 if form == 'identity' else None)
    assert len(report) == count > 0
    torch.testing.assert_close(output(model), output(expected), rtol=1e-9, atol=1e-9)
    assert (output(model) - output(plain)).abs().max() > 1e-3
    for row, before, after in zip(report, measure(plain), measure(model), strict=True):
        assert (row.kappa, row.conditioned_kappa) == pytest.approx((before.kappa, after.kappa), rel=1e-6)
        assert (before.conditioned_kappa, after.conditioned_kappa) == (None, None)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(plain), output(model))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('form', ['identity', 'svd'])
def test_function_keeping_form(family, form):
    model = FAMILIES[family][0]().eval()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        report = condition(model, form, keep_function=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(report.corrections) > 0


class Attention(nn.Module):
    """The smallest attention that condition finds, with weights small enough for any lam to improve them."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv = nn.Linear(8, 24)
        nn.init.normal_(self.qkv.weight, std=0.01)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-3, -2)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)


def corrections(model):
    return [module for module in model.modules() if isinstance(module, Correction)]


@pytest.mark.parametrize('form', [dict(lam=0.1), dict(lam=0.1, per_head=True), dict(type='svd')])
class TestCorrectionsStayAsTheyAre:
    """Whatever is done to a model with a Correction, C stays bit-identical and the model computes with W + C."""

    @pytest.fixture
    def model(self, form):
        model = Attention()
        parametrize.register_parametrization(model.qkv, 'weight', Correction(model.qkv.weight, **form, heads=2))
        return model

    @pytest.fixture
    def C(self, model):
        return corrections(model)[0].make_C(torch.zeros(24, 8))

    def test_in_training_with_weight_decay(self, model, C, form):
        before = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            model(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
        for old, new in zip(corrections(before)[0].buffers(), corrections(model)[0].buffers(), strict=True):
            assert torch.equal(old, new)
        old, new = (m.qkv.parametrizations.weight.original for m in (before, model))
        assert (old != new).all()
        assert torch.equal(model.qkv.weight, new + C)

    def test_through_dtypes_copies_and_state_dicts(self, model, C, form):
        for changed in (
            copy.deepcopy(model).half().float(),
            copy.deepcopy(model).bfloat16().double().float(),
            copy.deepcopy(model).to('cpu'),
        ):
            assert torch.equal(corrections(changed)[0].make_C(torch.zeros(24, 8)), C)
        assert copy.deepcopy(model).half().qkv.weight.dtype == torch.float16
        twin = Attention()
        other = Correction(twin.qkv.weight, **{**form, **({'lam': 0.5} if 'lam' in form else {})}, heads=2)
        parametrize.register_parametrization(twin.qkv, 'weight', other)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.qkv.weight, model.qkv.weight)
        with pytest.raises(RuntimeError, match='parametrizations'):
            Attention().load_state_dict(model.state_dict())

    @pytest.mark.parametrize('update_buffers', [False, True])
    def test_in_an_exponential_moving_average(self, model, C, update_buffers, form):
        average = ExponentialMovingAverage(model, momentum=0.1, update_buffers=update_buffers)
        for _ in range(3):
            with torch.no_grad():
                model.qkv.parametrizations.weight.original.add_(1)
            average.update_parameters(model)
        assert torch.equal(corrections(average)[0].make_C(torch.zeros(24, 8)), C)

    def test_under_autocast(self, model, C, form):
        x = torch.randn(4, 8)
        with torch.autocast('cpu', torch.bfloat16):
            out = model.qkv(x)
            W = model.qkv.parametrizations.weight.original + C  # added in float32, then rounded
            assert torch.equal(out, nn.functional.linear(x, W, model.qkv.bias))

    def test_under_compile(self, model, C, form):
        x = torch.randn(4, 8)
        compiled = torch.compile(model.qkv, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), model.qkv(x))
        compiled(x).sum().backward()
        torch.testing.assert_close(model.qkv.parametrizations.weight.original.grad[0], x.sum(0))

    def test_in_distributed_data_parallel(self, model, C, form, tmp_path):
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel(torch.randn(4, 8)).sum().backward()
            assert torch.equal(corrections(parallel)[0].make_C(torch.zeros(24, 8)), C)
            assert len(list(parallel.parameters())) == 2  # W and bias
        finally:
            torch.distributed.destroy_process_group()


def test_a_lam_that_increases_kappa_is_reported_with_numbers():
    model = Attention()
    nn.init.normal_(model.qkv.weight, std=1)
    kappa = torch.linalg.cond(model.qkv.weight.double().detach().unflatten(0, (3, 8)))
    sigma_max = torch.linalg.matrix_norm(model.qkv.weight.detach()[:8], 2)
    with pytest.warns(UserWarning, match=f'3 of 3 .* lam = 1e-06, sigma_max = {sigma_max:.3g}'):
        report = condition(model, lam=1e-6)
    torch.testing.assert_close(torch.tensor([row.kappa for row in report]).double(), kappa, rtol=1e-4, atol=0)
    assert 'not above sigma_max' in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not condition(Attention()).describe_worsened()
    weak = SpecXCiT(dict(dim=32, depth=6, num_heads=4), conditioning=dict(type='identity', lam=1e-12))
    assert 'does not improve' in measure(weak).describe_worsened()


def test_the_per_head_form_is_measured_head_by_head():
    model = Attention()
    W = model.qkv.weight.detach().double().clone().unflatten(0, (3, 2, 4))
    report = condition(model, lam=3.0, per_head=True)
    assert [row.role for row in report] == ['Q0', 'Q1', 'K0', 'K1', 'V0', 'V1']
    for before, after in ((W, 'kappa'), (W + 3 * torch.eye(4, 8), 'conditioned_kappa')):
        sigma = torch.linalg.svdvals(before.flatten(0, 1))
        kappa = torch.tensor([getattr(row, after) for row in report]).double()
        torch.testing.assert_close(kappa, sigma[:, 0] / sigma[:, -1], rtol=1e-4, atol=0)  # W is computed from W + C


def test_unsupported_models_are_rejected_and_unchanged():
    conditioned, parametrized, headless = Attention(), Attention(), Attention()
    parametrize.register_parametrization(conditioned.qkv, 'weight', Correction(conditioned.qkv.weight))
    nn.utils.parametrizations.weight_norm(parametrized.qkv)
    del headless.num_heads
    tied = nn.Sequential(Attention(), Attention())
    tied[1].qkv.weight = tied[0].qkv.weight
    uneven = Attention()
    uneven.qkv = nn.Linear(8, 20)
    own = SpecXCiT(dict(dim=32, depth=6, num_heads=4), conditioning=dict(type='identity'))
    for model, arguments, message in (
        (nn.Linear(3, 3), {}, 'found no query'),
        (conditioned, {}, 'conditioned already'),
        (own, {}, 'conditioned already'),
        (parametrized, {}, 'parametrization'),
        (headless, dict(per_head=True), 'number of heads'),
        (headless, dict(type='initialisation'), 'number of heads'),
        (Attention().to('meta'), {}, 'meta device'),
        (tied, {}, 'shares its weight with 1.qkv'),
        (uneven, {}, 'unknown order: qkv .20 x 8.'),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError, match=message):
            condition(model, **arguments)
        assert before.keys() == model.state_dict().keys()


def test_fold_includes_a_backbones_own_correction():
    for conditioning in (dict(type='identity', lam=3.0, per_head=True), dict(type='svd')):
        model = SpecXCiT(dict(dim=32, depth=6, num_heads=4), conditioning=conditioning).eval()
        before = output(model)
        assert describe_conditioning(model.state_dict()) != 'None'
        fold(model)
        torch.testing.assert_close(output(model), before, rtol=0, atol=1e-5)
        SpecXCiT(dict(dim=32, depth=6, num_heads=4)).load_state_dict(model.state_dict())


def test_without_mmdetection():
    """The conditioning works with only torch installed."""
    code = """
import sys
for name in ('mmdet', 'mmengine', 'mmcv', 'torchvision', 'numpy', 'scipy', 'pycocotools'):
    sys.modules[name] = None
import torch
from spec_mmdet.conditioning import condition, fold
attention = torch.nn.MultiheadAttention(8, 2)
print(len(condition(attention)))
fold(attention)
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout == '3\n', run.stderr
