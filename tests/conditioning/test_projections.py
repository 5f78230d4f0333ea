"""Test which rows count as queries, keys and values, on attention whose rows are known."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spec_mmdet import InputError
from spec_mmdet.conditioning import condition, find_projections, measure
from spec_mmdet.conditioning.finding.projections import find
from spec_mmdet.conditioning.finding.rows import RowSelection, parse_layout, select_rows

sys.path.insert(0, str(Path(__file__).parent))


class Attention(nn.Module):
    """Softmax attention with one layer, its rows in the order of a layout, gates among them."""

    def __init__(self, layout, k=12, transposed=False, bias=True):
        super().__init__()
        self.blocks = parse_layout(layout)
        self.num_heads = sum(role == 'Q' for role, _ in self.blocks)
        self.num_kv_heads = sum(role == 'K' for role, _ in self.blocks)
        self.head_dim, self.v_dim = dict(self.blocks)['Q'], dict(self.blocks)['V']
        rows = sum(count for _, count in self.blocks)
        self.qkv = Conv1D(rows, k) if transposed else nn.Linear(k, rows, bias=bias)
        self.proj = nn.Linear(self.num_heads * self.v_dim, k)

    def forward(self, x):
        parts = self.qkv(x).split([count for _, count in self.blocks], dim=-1)
        heads = {r: [p for (role, _), p in zip(self.blocks, parts) if role == r] for r in 'QKV'}
        q, k, v = (torch.stack(heads[r], 1) for r in 'QKV')
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class Conv1D(nn.Module):
    """transformers' class by its name: the weight's last dimension is the outputs."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@st.composite
def layouts(draw):
    """Rows role by role, head by head or group by group, with heads that share keys, of any sizes."""
    groups, share = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    d, v = draw(st.integers(2, 5)), draw(st.integers(2, 5))
    by_role = f'{groups * share}q{d} {groups}k{d} {groups}v{v}'
    return draw(st.sampled_from([by_role, f'{groups}({share}q{d} k{d} v{v})']))


@given(layouts(), st.booleans())
@settings(max_examples=40)
def test_the_rows_are_found_whatever_their_order(layout, transposed):
    model = Attention(layout, transposed=transposed)
    index = dict.fromkeys('QKV', ())
    rows = iter(range(10_000))
    for role, count in model.blocks:
        index[role] += tuple(itertools.islice(rows, count))
    found = {}
    for projection in find_projections(model):
        weight = projection.weight.T if transposed else projection.weight
        for role, W in zip(projection.roles, projection.W):
            found[role] = W, projection.heads
            taken = weight.detach()[list(index[role])]
            same_heads = sorted(map(tuple, W.unflatten(0, (projection.heads, -1)).flatten(1).tolist()))
            assert same_heads == sorted(map(tuple, taken.unflatten(0, (projection.heads, -1)).flatten(1).tolist()))
    assert {role: heads for role, (_, heads) in found.items()} == {
        'Q': model.num_heads,
        'K': model.num_kv_heads,
        'V': model.num_kv_heads,
    }


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('per_head', [False, True])
def test_head_first_rows_are_corrected_in_place(transposed, per_head):
    """TinyViT's and GPT-NeoX's order, with values of another width as in EfficientFormer, against C added by hand."""
    model = Attention('2(q4 k4 v6)', transposed=transposed)
    W = model.qkv.weight.detach().clone()
    W = (W.T if transposed else W).unflatten(0, (2, 14))
    for part in (W[:, :4], W[:, 4:8], W[:, 8:]):
        eye = torch.eye(2 * part.shape[1], 12).unflatten(0, (2, -1)) if not per_head else torch.eye(part.shape[1], 12)
        part += 3.0 * eye
    plain = copy.deepcopy(model)
    plain.qkv.weight.data = W.flatten(0, 1).T if transposed else W.flatten(0, 1)
    report = condition(model, lam=3.0, per_head=per_head)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(model(x), plain(x))
    sigma = torch.linalg.svdvals(W[:, :4].flatten(0, 1) if not per_head else W[0, :4])
    row = report[0]
    assert row.role == ('Q0' if per_head else 'Q')
    assert row.conditioned_kappa == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-4)


class Gated(nn.Module):
    """Qwen3-Next: q_proj contains each head's queries and then its gate, and four query heads share two key heads."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 32), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o_proj = nn.Linear(16, 12)

    def forward(self, x, attention_mask):
        q, gate = self.q_proj(x).unflatten(-1, (4, 8)).chunk(2, dim=-1)
        k, v = (layer(x).unflatten(-1, (2, 4)) for layer in (self.k_proj, self.v_proj))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return self.o_proj((out * gate.sigmoid()).flatten(2))


def test_a_gate_among_the_queries_is_unchanged():
    model = Gated()
    gate = model.q_proj.weight.detach().unflatten(0, (4, 2, 4))[:, 1].clone()
    found = {projection.roles: projection for projection in find_projections(model)}
    assert {roles: projection.heads for roles, projection in found.items()} == {'Q': 4, 'K': 2, 'V': 2}
    assert torch.equal(found['Q'].W[0], model.q_proj.weight.detach().unflatten(0, (4, 2, 4))[:, 0].flatten(0, 1))
    report = condition(model, per_head=True)
    assert [row.role for row in report] == ['Q0', 'Q1', 'Q2', 'Q3', 'K0', 'K1', 'V0', 'V1']
    assert torch.equal(model.q_proj.weight.detach().unflatten(0, (4, 2, 4))[:, 1], gate)
    assert all(row.conditioned_kappa < 3.0001 for row in report)


class OfItsOwnKind(Attention):
    """Needs an input that cannot be guessed."""

    def forward(self, x, graph):
        return super().forward(x * graph['weight'])


class Model(nn.Module):
    def __init__(self, *attention):
        super().__init__()
        self.blocks = nn.ModuleList(attention)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, {'weight': 2.0}) if isinstance(block, OfItsOwnKind) else block(x)
        return x


def test_an_ambiguous_layout_is_an_error_that_names_the_argument_to_pass():
    layout = '2(q4 k4 v6)'
    model = Model(Attention(layout), OfItsOwnKind(layout), OfItsOwnKind(layout))
    with pytest.raises(InputError, match=r"blocks\.1\.qkv .*28 x 12.*'blocks\.\*\.qkv'.*example=.*partial=True"):
        condition(model)
    with pytest.raises(InputError, match='unknown'):
        measure(model)
    for arguments in (dict(layout={'blocks.*.qkv': layout}), dict(example=torch.randn(1, 5, 12))):
        report = condition(copy.deepcopy(model), **arguments)
        assert [(row.name, row.shape) for row in report][:2] == [
            ('blocks.0.qkv[QK]', (8, 12)),
            ('blocks.0.qkv[QK]', (8, 12)),
        ]
        assert len(report) == 9 and not report.left_out
    report = condition(model, partial=True)
    assert len(report) == 3 and list(report.left_out) == ['blocks.1.qkv', 'blocks.2.qkv']
    assert 'blocks.2.qkv' in str(report)


@pytest.mark.parametrize(
    ('layout', 'message'),
    [
        ({'*.qkv': '2(q4 k4 v6'}, 'parenthesis'),
        ({'*.qkv': 'q4 x4'}, 'cannot be read'),
        ({'*.qkv': '2q4 2k4 2v4'}, '28 rows'),
        ({'*.qkv': '2(q4 k10)'}, '28 rows for Q, K, V'),
        ({'*.qkv': 'q4 q6 k9 v9'}, 'different numbers'),
        ({'*.kqv': '2q4 2k4 2v6'}, 'kqv'),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, message):
    with pytest.raises(InputError, match=message):
        condition(Model(Attention('2(q4 k4 v6)')), layout=layout)


def test_an_example_that_does_not_run_is_refused():
    with pytest.raises(InputError, match='example'):
        condition(Model(Attention('2(q4 k4 v6)')), example=torch.randn(1, 5, 7))


class HalfAttention(nn.Module):
    """Named attention, without projections that can be recognised."""

    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.out(self.mix(x).softmax(1) * x)


class Mixer(nn.Module):
    """Computes attention under another name."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        a, b, c = self.into(x).chunk(3, dim=-1)
        return self.out((a @ b.mT).softmax(-1) @ c)


class Router(nn.Module):
    """A softmax over experts is not attention."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(12, 4)

    def forward(self, x):
        return self.gate(x).softmax(-1)


def test_skipped_attention_is_listed():
    model = Model(Attention('2q6 2k6 2v6'), HalfAttention(), Mixer(), Router(), nn.MultiheadAttention(12, 2))
    found = find(model)
    assert found.uncovered == {
        'blocks.1': 'is named attention (HalfAttention)',
        'blocks.2': 'computes attention (Mixer)',
    }
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r'2 modules .*blocks\.1 .*blocks\.2 .*partial=True'):
        condition(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = condition(model, partial=True)
    assert {row.name for row in report} == {'blocks.0.qkv', 'blocks.4.in_proj'}
    assert report.left_out == found.uncovered


def test_projections_without_counterparts_are_listed():
    attention = Gated()
    attention.query_global = nn.Linear(12, 16)  # of Longformer's three
    assert list(find(attention).uncovered) == ['query_global']


@given(layouts(), st.booleans())
def test_rows_are_written_back_to_their_places(layout, transposed):
    blocks = parse_layout(layout)
    rows = sum(count for _, count in blocks)
    weight = torch.randn((5, rows) if transposed else (rows, 5))
    parts = [stack.put(stack.take(weight), weight) for stack in select_rows(blocks, transposed)]
    assert torch.equal(sum(parts), weight)


def test_a_layout_given_as_text():
    assert parse_layout('2(2q3 k3) 2v4 -5') == 2 * (2 * (('Q', 3),) + (('K', 3),)) + 2 * (('V', 4),) + (('-', 5),)
    assert select_rows(parse_layout('2q3 2k3 2v3')) == [RowSelection('QKV', 2)]
    assert select_rows(parse_layout('2(q1 -1) 2(k1 v1)')) == [RowSelection('QKV', 2, (0, 2, 4, 6, 5, 7))]
