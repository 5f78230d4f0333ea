"""Test the corrections against their theorems."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec_mmdet import InputError, SpecXCiT
from spec_mmdet.conditioning import (
    Correction,
    compute_condition_number,
    compute_identity_correction,
    compute_svd_correction,
    describe_conditioning,
)


@st.composite
def matrices(draw, dtype=torch.float64):
    """Draw Gaussian matrices of any shape, rank and scale."""
    D, k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rank = draw(st.integers(0, min(D, k)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    left = torch.randn(D, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, k, generator=generator, dtype=torch.float64)
    return (left @ right * 10.0 ** draw(st.integers(-6, 6) if dtype != torch.float16 else st.integers(-2, 2))).to(dtype)


@given(matrices())
def test_exact_form_bounds_the_condition_number_by_two(W):
    sigma = torch.linalg.svdvals(W)
    if sigma[0] == 0:
        assert not compute_svd_correction(W).any()
        return
    kappa = compute_condition_number(W + compute_svd_correction(W)).item()
    assert kappa <= 2 * (1 + 1e-9)
    assert kappa == pytest.approx((2 * sigma[0] / (sigma[-1] + sigma[0])).item(), rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@given(data=st.data())
def test_exact_form_bounds_the_condition_number_in_any_dtype(dtype, data):
    W = data.draw(matrices(dtype))
    C = compute_svd_correction(W)
    assert C.dtype == dtype
    if not W.any():
        return
    # C, and W + C, are each rounded by half a unit in the last place of entries up to 2 sigma_max.
    rounding = 2 * torch.finfo(dtype).eps * max(W.shape)
    assert compute_condition_number(W + C).item() <= 2 * (1 + 2 * rounding) / max(1 - 2 * rounding, 1e-3)


@given(matrices(), st.floats(1.01, 100))
def test_identity_form_keeps_the_bound_of_theorem_3_8(W, ratio):
    sigma_max = torch.linalg.svdvals(W)[0].item()
    lam = ratio * sigma_max
    if lam == 0:
        return
    kappa = compute_condition_number(W + compute_identity_correction(W, lam)).item()
    assert kappa <= (lam + sigma_max) / (lam - sigma_max) * (1 + 1e-9)


@given(matrices(), st.integers(1, 4), st.floats(1.01, 100))
def test_per_head_form_keeps_the_bound_in_each_head(W, heads, ratio):
    W = torch.cat([W * (h + 1) for h in range(heads)])
    sigma_max = torch.linalg.svdvals(W.unflatten(0, (heads, -1))).max().item()
    lam = ratio * sigma_max
    if lam == 0:
        return
    C = Correction(W, lam=lam, per_head=True, blocks=1, heads=heads).make_C(W)
    by_hand = (lam * torch.eye(len(W) // heads, W.shape[1]).double()).repeat(heads, 1)
    torch.testing.assert_close(C, by_hand, rtol=1e-7, atol=0)  # lam is stored in single precision
    for W_head, C_head in zip(W.chunk(heads), C.chunk(heads)):
        assert compute_condition_number(W_head + C_head).item() <= (lam + sigma_max) / (lam - sigma_max) * (1 + 1e-4)


def test_condition_number_of_known_matrices():
    assert compute_condition_number(torch.diag(torch.tensor([4.0, 2.0, 1.0]))) == 4
    assert compute_condition_number(torch.zeros(3, 2)) == torch.inf
    assert compute_condition_number(
        torch.stack([torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, 0.5]))])
    ).tolist() == [1, 2]


@given(matrices(), st.integers(1, 3), st.booleans(), st.sampled_from([None, 1.5, 2.0, 8.0]))
def test_a_relative_lambda_bounds_every_matrix(W, heads, per_head, sigmas):
    """Two projections of different scales: lambda follows sigma_max of each, or of each head in the per-head form."""
    rows = torch.cat([W * (h + 1) for h in range(heads)])
    stacked = torch.cat([rows, 100 * rows])
    if not W.any():
        return
    correction = Correction(stacked, sigmas=sigmas, per_head=per_head, blocks=2, heads=heads)
    split = (2 * heads, -1) if per_head else (2, -1)
    sigmas = sigmas or 2
    for before, after in zip(stacked.unflatten(0, split), correction(stacked).unflatten(0, split)):
        expected = before + sigmas * torch.linalg.svdvals(before)[0] * torch.eye(*before.shape)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
        assert compute_condition_number(after).item() <= (sigmas + 1) / (sigmas - 1) * (1 + 1e-5)
    restored = Correction.from_state(stacked, correction.state_dict(), blocks=2)
    assert torch.equal(restored(stacked), correction(stacked))


@pytest.mark.parametrize('conditioning', [dict(type='identity', lam=3.0), dict(type='svd')])
def test_correction_treats_stacked_projections_separately(conditioning):
    W = torch.randn(3, 8, 8, dtype=torch.float64)
    W[2] *= 100  # its singular values must not affect the others' corrections
    corrected = Correction(W.flatten(0, 1), **conditioning)(W.flatten(0, 1)).unflatten(0, (3, 8))
    for block, W_block in zip(corrected, W):
        if conditioning['type'] == 'svd':
            U, S, Vh = torch.linalg.svd(W_block)
            expected = W_block + S[0] * U @ Vh
        else:
            expected = W_block + 3 * torch.eye(8, dtype=torch.float64)
        torch.testing.assert_close(block, expected)


@pytest.mark.parametrize('conditioning', [dict(lam=10.0), dict(sigmas=2.0), dict(type='svd')])
def test_correction_is_fixed_while_the_weight_trains(conditioning):
    linear = torch.nn.Linear(8, 24)
    correction = Correction(linear.weight, **conditioning)
    before, W_before = copy.deepcopy(correction), linear.weight.detach().clone()
    assert not list(correction.parameters())
    module = torch.nn.ModuleList([linear, correction])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.linear(torch.randn(4, 8), correction(linear.weight)).square().sum().backward()
        optimizer.step()
    for old, new in zip(before.buffers(), correction.buffers()):
        assert torch.equal(old, new)
    assert not torch.equal(W_before, linear.weight)


@pytest.mark.parametrize('conditioning', [dict(type='polar'), dict(lam=0), dict(lam=-1), dict(type='svd', lam=1.0),
    dict(sigmas=0), dict(lam=1.0, sigmas=2.0), dict(type='svd', sigmas=2.0)])  # fmt: skip
def test_wrong_arguments_are_refused(conditioning):
    with pytest.raises(ValueError, match='conditioning'):
        Correction(torch.randn(24, 8), **conditioning)


def test_a_relative_lambda_of_a_zero_matrix_is_refused():
    with pytest.raises(ValueError, match='sigma_max of a projection is 0'):
        Correction(torch.cat([torch.randn(16, 8), torch.zeros(8, 8)]))
    assert Correction(torch.zeros(24, 8), lam=1.0)(torch.zeros(24, 8)).sum() == 24


def test_a_relative_lambda_is_set_once_from_the_initial_weights():
    arch = dict(dim=32, depth=4, num_heads=4)
    model = SpecXCiT(arch, conditioning=dict(sigmas=3.0, per_head=True))
    attn = model.blocks[2].attn
    W = attn.qkv.weight.detach().clone().unflatten(0, (3, 4, 8))
    sigma_max = torch.linalg.svdvals(W)[..., 0]
    torch.testing.assert_close(attn.correction.lam, 3 * sigma_max)
    assert describe_conditioning(model.state_dict()) == "dict(type='identity', sigmas=3, per_head=True)"
    with torch.no_grad():
        attn.qkv.weight.mul_(7)  # training
    other = SpecXCiT(arch, conditioning=dict(sigmas=3.0, per_head=True))
    assert not torch.equal(other.blocks[2].attn.correction.lam, attn.correction.lam)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.blocks[2].attn.correction.lam, 3 * sigma_max)
    for refused in (dict(sigmas=3.0), dict(sigmas=2.0, per_head=True), dict(lam=3.0, per_head=True)):
        with pytest.raises(InputError, match=r'sigmas=3, per_head=True'):
            SpecXCiT(arch, conditioning=refused).load_state_dict(model.state_dict())
