"""condition() changes the output exactly as W + C predicts, or rejects the model and leaves it unchanged."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from spec_mmdet import InputError
from spec_mmdet.conditioning import condition

LAYOUT = {'attention.qkv': '2q4 2k4 2v4'}


class Attention(nn.Module):
    """Softmax attention with two heads of four channels; ``project`` computes q, k and v."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def project(self, x):
        return self.qkv(x)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attention=None):
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), attention or Attention()

    def forward(self, x):
        return self.attention(self.first(x))


def rejects(model, message, *, examples=(None,), **arguments):
    """Check that condition() raises, with and without an example, and leaves every bit unchanged."""
    for example in examples:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            condition(model, example=example, **arguments)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key


EXAMPLES = (None, torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('layout', [None, LAYOUT])
@pytest.mark.filterwarnings('ignore')  # torch's warnings about the older forms
@pytest.mark.parametrize(
    'recompute',
    [
        weight_norm,
        spectral_norm,
        lambda layer: prune.l1_unstructured(layer, 'weight', 0.3),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_weights_that_are_recomputed(recompute, layout):
    model = Model()
    recompute(model.attention.qkv)
    rejects(model, 'recomputed|parametrization', examples=EXAMPLES, layout=layout)


@pytest.mark.parametrize('layout', [None, LAYOUT])
@pytest.mark.parametrize('where', ['attention.qkv', 'attention', ''])
@pytest.mark.parametrize('write', ['copy', 'data', 'parameter'])
def test_weights_that_a_hook_writes(where, write, layout):
    """The weight is changed in place, as new data or as a new parameter, before the layer, attention or model runs."""
    model = Model()
    layer, kept = model.attention.qkv, model.attention.qkv.weight.detach().clone()

    def hook(module, args):
        if write == 'copy':
            with torch.no_grad():
                layer.weight.copy_(kept)
        elif write == 'data':
            layer.weight.data = kept.clone()
        else:
            layer.weight = nn.Parameter(kept.clone())

    model.get_submodule(where).register_forward_pre_hook(hook)
    before = model(EXAMPLES[1])
    for example in EXAMPLES:
        with pytest.raises(InputError, match='recomputed|overwrites|directly|predicts|computes attention'):
            condition(model, layout=layout, example=example)
        assert torch.equal(model.attention.qkv.weight, kept) and torch.equal(model(EXAMPLES[1]), before)


class Quantised(nn.Linear):
    """Rounds its weight before it is used."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)


class Equalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.5, self.bias)


@pytest.mark.parametrize('kind', [Quantised, Equalised])
def test_layers_that_change_their_weight_before_using_it(kind):
    model = Model()
    model.attention.qkv = kind(8, 24)
    layout = {f'*{name}': rows for name, rows in LAYOUT.items()}
    rejects(model, 'qkv is .*changed by its layer', examples=EXAMPLES, layout=layout)
    both = nn.Sequential(model, Model())
    report = condition(both, partial=True, layout=layout)
    assert {row.name for row in report} == {'1.attention.qkv'} and '0.attention.qkv' in report.left_out


def test_torch_ao_attention_is_conditioned_in_its_own_layers():
    """Inherits in_proj_weight without using it; computes with linear_Q, linear_K and linear_V."""
    attention = torch.ao.nn.quantizable.MultiheadAttention(8, 2, batch_first=True)
    x = EXAMPLES[1]
    by_hand = copy.deepcopy(attention)
    for layer in (by_hand.linear_Q, by_hand.linear_K, by_hand.linear_V):
        layer.weight.data += 3 * torch.eye(8)
    report = condition(attention, lam=3.0, example=(x, x, x))
    assert [row.name for row in report] == ['linear_Q', 'linear_K', 'linear_V']
    torch.testing.assert_close(attention(x, x, x)[0], by_hand(x, x, x)[0])
    assert (attention(x, x, x)[0] - nn.MultiheadAttention.forward(attention, x, x, x)[0]).abs().max() > 1e-3


def test_a_second_call_is_rejected():
    model = Model()
    report = condition(model)
    for again in (model, copy.deepcopy(model), nn.Sequential(model)):
        rejects(again, 'qkv is conditioned already')
    rejects(model, 'earlier call', type='initialisation')
    before = model.attention.qkv.weight.detach().clone()
    restored = condition(model, keep_function=True).corrections  # as after torch.load of a pickled model
    restored.load_state_dict(report.corrections.state_dict())
    assert torch.equal(restored['attention.qkv'].C, report.corrections['attention.qkv'].C)
    assert torch.equal(model.attention.qkv.weight, before)


def test_two_parameters_over_one_storage():
    tied = nn.Sequential(Model(), Model())
    tied[1].attention.qkv.weight = nn.Parameter(tied[0].attention.qkv.weight.data)
    overlapping = Model()
    overlapping.attention.proj.weight = nn.Parameter(overlapping.attention.qkv.weight.data[16:])
    with_buffer = Model()
    with_buffer.register_buffer('alias', with_buffer.attention.qkv.weight.data[3])
    for model in (tied, overlapping, with_buffer):
        rejects(model, 'shares its weight')
    flat = torch.randn(24 * 8 + 64)  # adjacent parameters in one storage, as in flattened optimisers
    beside = Model()
    beside.attention.qkv.weight = nn.Parameter(flat[:192].view(24, 8))
    beside.attention.proj.weight = nn.Parameter(flat[192:].view(8, 8))
    assert len(condition(beside)) == 3


def test_a_copy_of_the_weight_that_the_model_hides():
    """An alias that is neither a parameter nor a buffer; only the output reveals it."""
    model = Model()
    alias = model.attention.qkv.weight.data[:8]
    model.first.register_forward_hook(lambda module, args, out: out @ alias)
    rejects(model, 'does not change as W . C predicts', examples=EXAMPLES)


def test_all_weights_are_changed_or_none():
    model = nn.Sequential(Model(), Model())
    with torch.inference_mode():
        model[1].attention.qkv.weight = nn.Parameter(torch.randn(24, 8))
    rejects(model, '1.attention.qkv .*inference_mode')


def test_expanded_weights():
    model = Model()
    model.attention.qkv.weight = nn.Parameter(torch.randn(1, 8).expand(24, 8))
    rejects(model, 'expanded')


def test_int8_weights():
    model = Model()
    model.attention.qkv.weight = nn.Parameter(torch.ones(24, 8, dtype=torch.int8), requires_grad=False)
    rejects(model, r'qkv is quantised \(torch.int8\).*before quantising')
    model = nn.Sequential(Model(), Model())
    model[0].attention.qkv.weight = nn.Parameter(torch.ones(24, 8, dtype=torch.int8), requires_grad=False)
    assert list(condition(model, partial=True).left_out) == ['0.attention.qkv']


@pytest.mark.filterwarnings('ignore:Initializing zero-element')
@pytest.mark.parametrize('shape', [(0, 24), (8, 0), (0, 0)])
def test_zero_channels(shape):
    model = Attention()
    model.qkv = nn.Linear(*shape)
    rejects(model, 'qkv.* no rows or no columns')


def test_values_that_are_not_finite():
    model = Model()
    model.attention.qkv.weight.data[3, 4] = torch.nan
    with pytest.raises(InputError, match='NaN'):
        condition(model)


class NonLocal(nn.Module):
    """A non-local block, beside the recognised attention."""

    def __init__(self):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return x + (self.theta(x) @ self.phi(x).transpose(1, 2)).softmax(-1)@self.g(x)  # fmt: skip


class DotProduct(NonLocal):
    """Attention without a softmax."""

    def forward(self, x):
        return torch.matmul(self.theta(x) @ self.phi(x).mT / x.shape[1], self.g(x))


class Einsum(nn.Module):
    """Attention with parameters of its own and einsum."""

    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(8, 2, 4) / 8) for _ in range(3))

    def forward(self, x):
        q, k, v = (torch.einsum('bnc,chd->bhnd', x, w) for w in (self.wq, self.wk, self.wv))
        return torch.einsum('bhnm,bhmd->bnhd', torch.einsum('bhnd,bhmd->bhnm', q, k).softmax(-1), v).flatten(2)


class Beside(Attention):
    """Attention computed in the module of the recognised one, from other layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return super().forward(x) + nn.functional.scaled_dot_product_attention(self.a(x), self.b(x), self.c(x))


class Router(nn.Module):
    """A mixture of experts: softmax and products without attention."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        return torch.einsum('bne,bned->bnd', self.gate(x).softmax(-1), torch.einsum('bnc,ecd->bned', x, self.experts))


@pytest.mark.parametrize('kind', [NonLocal, DotProduct, Einsum, Beside])
@pytest.mark.parametrize('example', EXAMPLES)
@pytest.mark.parametrize('runs', [True, False])
def test_attention_beside_a_recognised_layer_is_found_by_running_the_model(kind, example, runs):
    model = nn.Sequential(Model(), Router(), kind(), Model())
    if not runs:  # the parts run separately
        model = nn.Sequential(nn.Identity(), *model)
        model.forward = lambda a, b, c: nn.Sequential.forward(model, a)
        example = example if example is None else (example, None, None)
    name = '2' if runs else '3'
    with pytest.raises(InputError, match=f'1 modules .*: {name} computes attention'):
        condition(model, example=example)
    report = condition(model, example=example, partial=True)
    assert report.left_out == {name: f'computes attention ({kind.__name__})'}
    condition(nn.Sequential(Model(), Router(), Model()))


def test_adapters_and_shards_are_named():
    peft = pytest.importorskip('peft')
    model = timm.create_model('test_vit')
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=['qkv'], r=2))
    rejects(adapted, r'condition: \S*qkv has an adapter .*before get_peft_model')


def test_sharded_weights_are_named(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = fully_shard(Model())
        with pytest.raises(InputError, match=r'condition: \S+ is sharded.*before fully_shard'):
            condition(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_conditioned_model_changes_as_predicted(dtype):
    """Compare with W + C added by hand in a timm model whose code passes the weight to a function itself."""
    model = timm.create_model('beit_base_patch16_224', depth=1, embed_dim=24, num_heads=2, img_size=32).eval().to(dtype)
    by_hand, images = copy.deepcopy(model), torch.randn(1, 3, 32, 32).to(dtype)
    for W in by_hand.blocks[0].attn.qkv.weight.data.chunk(3):
        W += 2 * torch.eye(24, dtype=dtype)
    condition(model, lam=2.0)
    assert torch.equal(model(images), by_hand(images))
