"""Test the warnings of condition() against what they predict: trained weights, saturated attention, sigma_max."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_condition import FAMILIES, output
from torch import nn

from spec_mmdet import SpecXCiT
from spec_mmdet.conditioning import compute_sigma_max, condition, describe_conditioning, measure
from spec_mmdet.conditioning.effects import count_effective_keys, is_trained
from spec_mmdet.conditioning.spectra import compute_singular_values


@pytest.mark.parametrize('family', FAMILIES)
def test_trained_weights_are_distinguished_from_initial_ones(family):
    model = FAMILIES[family][0]()
    if 'MultiheadAttention' in family:  # without normalisation
        assert is_trained(model) is None
        assert 'unknown whether' in str(condition(model)).splitlines()[0]
        return
    assert is_trained(model) is False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'trained' not in str(condition(FAMILIES[family][0]()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        out = model(torch.randint(0, 50, (1, 64))) if isinstance(model, transformers.PreTrainedModel) else None
        out = model(torch.randn(2, 3, 64, 64)) if out is None else out.last_hidden_state
        (out[-1] if isinstance(out, tuple) else out).square().sum().backward()
    optimizer.step()
    assert is_trained(model)
    before = output(model.eval())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'trained' not in str(condition(copy.deepcopy(model), keep_function=True))
    assert torch.equal(output(model), before)
    with pytest.warns(UserWarning, match='have been trained'):
        report = condition(model)
    assert 'have been trained' in str(report).splitlines()[0]


def test_frozen_norms_do_not_show_whether_a_model_is_trained():
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    assert is_trained(model) is None


@pytest.mark.filterwarnings('ignore:lam is not above')
@pytest.mark.parametrize('conditioning', [dict(lam=0.5), dict(lam=2.0), dict(lam=10.0), dict(type='initialisation')])
def test_effective_keys_equal_those_of_the_models_own_attention(conditioning):
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    block = model.blocks[0]
    block.attn.fused_attn = False
    rows = []
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: rows.append(out))

    def own():
        block.attn(nn.functional.layer_norm(torch.randn(1, 197, 192), (192,)))
        P = rows.pop().double()
        return (-P.xlogy(P).sum(-1)).exp().mean().item()

    with torch.no_grad():
        before = own()
        report = condition(model, **conditioning)
        after = own()
    words = report.describe_saturation()
    assert float(words.split('attends to ')[1].split()[0]) == pytest.approx(after, rel=0.1)
    if 'lam' in conditioning:
        assert float(words.split('without C to ')[1].split()[0]) == pytest.approx(before, rel=0.05)
    assert ('hardly any gradient' in words) == (after < 2)


@pytest.mark.filterwarnings('ignore:lam is not above')
def test_saturated_attention_passes_on_no_gradient():
    def gradient(lam):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(192, 3, batch_first=True)
        condition(attention, lam=lam)
        x = torch.randn(1, 197, 192)
        attention(x, x, x)[0].square().sum().backward()
        Q, K, V = attention.in_proj_weight.grad.chunk(3)
        return Q.norm() / V.norm()

    assert gradient(10.0) < 1e-3 * gradient(0.5)


def test_attention_with_normalised_queries_has_no_saturation_warning():
    for model in (SpecXCiT(dict(dim=32, depth=6, num_heads=4), conditioning=dict(type='identity')),
                  timm.create_model('swinv2_tiny_window8_256', depths=(1, 1, 1, 1), embed_dim=24)):  # fmt: skip
        report = measure(model) if isinstance(model, SpecXCiT) else condition(model)
        assert report.describe_saturation() == ''


def test_keys_shared_by_several_queries():
    size = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaModel(transformers.LlamaConfig(intermediate_size=64, **size))
    assert 'median of 2 layers' in condition(model, type='initialisation').describe_saturation()
    W_Q, W_K = torch.randn(32, 16), torch.randn(8, 16)
    assert count_effective_keys(W_Q, W_K, 8) == pytest.approx(
        count_effective_keys(W_Q, W_K.view(2, 4, 16).repeat_interleave(4, 0).flatten(0, 1), 8)
    )
    assert count_effective_keys(0 * W_Q, W_K, 8) == pytest.approx(197)
    assert 1 <= count_effective_keys(W_Q, torch.randn(32, 9), 8) < 197


@given(st.integers(1, 30), st.integers(1, 30), st.floats(-3, 3), st.integers(0, 99))
def test_sigma_max_against_the_decomposition(D, k, log_scale, seed):
    W = 10**log_scale * torch.randn(3, 2, D, k, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(compute_sigma_max(W), torch.linalg.svdvals(W.double())[..., 0], rtol=1e-12, atol=0)


def test_conditioned_initialisation():
    model = timm.create_model('vit_tiny_patch16_224', depth=2)
    names = set(model.state_dict())
    report = condition(model, type='initialisation')
    Q, K, V = model.blocks[0].attn.qkv.weight.detach().double().view(3, 3, 64, 192)
    eye = torch.eye(64).double()
    for head in range(3):
        for W in (Q[head], K[head]):
            torch.testing.assert_close(W @ W.T, eye, rtol=0, atol=1e-5)
        assert torch.equal(V[head], torch.eye(64, 192).double())
    assert (Q[0] @ K[0].T).abs().max() < 0.6 and (Q[0] @ Q[1].T).abs().max() < 0.6  # independent tokens
    assert {row.role for row in report} == {f'{role}{head}' for role in 'QKV' for head in range(3)}
    assert all(row.kappa == pytest.approx(1, abs=1e-5) for row in report)
    assert not report.corrections and set(model.state_dict()) == names
    for arguments in (dict(lam=1.0), dict(per_head=True), dict(keep_function=True)):
        with pytest.raises(ValueError, match='initialisation'):
            condition(model, type='initialisation', **arguments)


def test_conditioned_initialisation_of_the_backbone():
    arch = dict(dim=32, depth=6, num_heads=4)
    model, plain = SpecXCiT(arch, conditioning=dict(type='initialisation')), SpecXCiT(arch)
    Q, K, V = model.blocks[3].attn.qkv.weight.detach().view(3, 4, 8, 32)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(8).expand(4, 8, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(K @ K.mT, torch.eye(8).expand(4, 8, 8), rtol=0, atol=1e-5)
    assert torch.equal(V, torch.eye(8, 32).expand(4, 8, 32))
    assert describe_conditioning(model.state_dict()) == 'None'
    plain.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match='no other arguments'):
        SpecXCiT(arch, conditioning=dict(type='initialisation', lam=1.0))


def test_the_table_is_computed_on_demand(monkeypatch):
    asked = []
    original = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, 'svdvals', lambda W: asked.append(W) or original(W))
    monkeypatch.setattr(torch.linalg, 'svd', None)
    report = condition(timm.create_model('vit_tiny_patch16_224', depth=2))
    assert not asked
    assert len(str(report).splitlines()) == 9 and len(asked) == 4  # W and W + C of two layers
    assert report[0].conditioned_kappa < report[0].kappa and len(asked) == 4


def test_a_decomposition_that_does_not_converge_is_nan():
    M = torch.randn(2, 3, 5)
    truth = np.linalg.svd(M.double().numpy(), compute_uv=False)
    assert np.allclose(compute_singular_values(M), truth, rtol=1e-12)
    M[1, 0, 0] = torch.nan  # LAPACK gives up
    assert compute_singular_values(M).shape == (2, 3) and compute_singular_values(M).isnan().all()
