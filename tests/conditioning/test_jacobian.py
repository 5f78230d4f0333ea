"""Test the analytic Jacobians against torch.func's, and the bounds on their condition numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from research.theorems import attention_jacobian, joint_bound, theorem_3_4_bounds, xca_jacobian
from spec_mmdet.conditioning import compute_condition_number
from spec_mmdet.conditioning.jacobian import compute_xca_singular_values
from spec_mmdet.models.attention import XCA

SMALL = st.integers(1, 5)


def randn(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def attention(X, W_Q, W_K, W_V, scale):
    return torch.softmax(scale * X @ W_Q @ (X @ W_K).T, dim=-1) @ X @ W_V


def xca(X, W_Q, W_K, W_V, temperature):
    Q, K = ((X @ W) / (X @ W).square().sum(0).sqrt() for W in (W_Q, W_K))
    return X @ W_V @ torch.softmax(temperature * Q.T @ K, dim=-1).T


@given(SMALL, SMALL, SMALL, SMALL, st.floats(0.1, 3), st.integers(0, 99))
def test_attention_jacobian_equals_autograds(N, D, k, v, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = [randn(*shape, generator=generator) for shape in ((N, D), (D, k), (D, k), (D, v))]
    for J, expected in zip(
        attention_jacobian(*arguments, scale), jacrev(attention, argnums=(1, 2, 3))(*arguments, scale), strict=True
    ):
        torch.testing.assert_close(J, expected.flatten(2).flatten(0, 1), rtol=0, atol=1e-10)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 3), st.integers(0, 99))
def test_xca_jacobian_equals_autograds(N, D, k, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = [randn(*shape, generator=generator) for shape in ((N, D), (D, k), (D, k), (D, k))]
    for J, expected in zip(
        xca_jacobian(*arguments, temperature), jacrev(xca, argnums=(1, 2, 3))(*arguments, temperature), strict=True
    ):
        torch.testing.assert_close(J, expected.flatten(2).flatten(0, 1), rtol=1e-8, atol=1e-9)


def test_xca_jacobian_equals_that_of_the_module_for_weight_and_bias():
    """Use a bias as one more row of W, for tokens with a last entry of 1."""
    module = XCA(12, 3, conditioning=dict(type='identity', lam=2.0)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    torch.nn.init.eye_(module.proj.weight)
    torch.nn.init.zeros_(module.proj.bias)
    x = torch.randn(1, 20, 12, dtype=torch.float64)

    def forward(weight, bias):
        return torch.func.functional_call(module, {'qkv.weight': weight, 'qkv.bias': bias}, (x,))[0]

    by_weight, by_bias = jacrev(forward, argnums=(0, 1))(module.qkv.weight.detach(), module.qkv.bias.detach())
    W = torch.cat([module.correction(module.qkv.weight.detach()), module.qkv.bias.detach()[:, None]], 1)
    X = torch.cat([x[0], torch.ones(20, 1).double()], 1)
    expected = torch.cat([by_weight, by_bias[..., None]], -1).view(20, 3, 4, 3, 3, 4, 13)  # n, h, i, QKV, h', b, a
    for h in range(3):
        projections = W.view(3, 3, 4, 13)[:, h].mT
        J = xca_jacobian(X, *projections, module.temperature[h, 0, 0].detach())
        for role in range(3):
            same_head = expected[:, h, :, role, h].transpose(-1, -2).reshape(80, 52)
            torch.testing.assert_close(J[role], same_head, rtol=1e-8, atol=1e-9)
            assert not expected[:, h, :, role, h - 1].any()  # another head's projections


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 5), st.floats(-4, 1), st.booleans(), st.integers(0, 99))
@settings(max_examples=200)
def test_xca_singular_values_equal_those_of_the_full_jacobian(N, D, k, log_scale, centred, seed):
    generator = torch.Generator().manual_seed(seed)
    X = randn(N, D, generator=generator)
    if centred and D > 1:
        X = X - X.mean(1, keepdim=True)  # as after LayerNorm: of rank D - 1
    W = [10**log_scale * randn(D, k, generator=generator) for _ in range(3)]
    W[0] = W[0] + torch.eye(D, k)
    rank = int(torch.linalg.matrix_rank(X))
    sigma = torch.linalg.svdvals(torch.cat(xca_jacobian(X, *W, 1.5), 1))
    sigma_min, sigma_max = compute_xca_singular_values(X, *W, 1.5)
    assert sigma_max == pytest.approx(sigma[0].item(), rel=1e-6)
    # Its inverse is squared in the computation.
    Q, K = (torch.nn.functional.normalize(X @ M, dim=0) for M in W[:2])
    kappa = compute_condition_number((1.5 * Q.T @ K).softmax(dim=1)).item()
    rel = max(1e-5, torch.finfo(torch.float64).eps * kappa**2)
    assert sigma_min == pytest.approx(sigma[rank * k - 1].item(), rel=rel, abs=1e-13 * sigma_max)


def draws(count):
    """Draw at most as many tokens as their width, and square projections whose scale does not saturate the softmax."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        D = int(torch.randint(2, 8, (), generator=generator))
        N = int(torch.randint(2, D + 1, (), generator=generator))
        scales = 10 ** (1.5 * torch.rand(3, generator=generator) - 1.5)
        scales[2] = scales[2] ** 4  # the value projection does not enter the softmax
        yield (
            randn(N, D, generator=generator),
            *(scale.double() * randn(D, D, generator=generator) / D**0.5 for scale in scales),
        )


def test_the_bounds_hold_on_a_thousand_draws():
    for X, *W in draws(1000):
        N, D = X.shape
        blocks = attention_jacobian(X, *W)
        ranks = (N * (N - 1), N * (N - 1), N * D)
        for J, bound, rank in zip(blocks, theorem_3_4_bounds(X, *W), ranks, strict=True):
            assert compute_condition_number(J, rank) <= bound * (1 + 1e-6)
        assert compute_condition_number(torch.cat(blocks, 1)) <= joint_bound(X, *W) * (1 + 1e-9)


@given(SMALL, SMALL, SMALL, st.floats(0.1, 2), st.integers(0, 99))
def test_the_joint_bound_holds_for_projections_of_any_width(N, k, v, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    arguments = [randn(*shape, generator=generator) for shape in ((N, 5), (5, k), (5, k), (5, v))]
    J = torch.cat(attention_jacobian(*arguments, scale), 1)
    assert compute_condition_number(J) <= joint_bound(*arguments, scale) * (1 + 1e-9)


def test_theorem_3_4_of_the_paper_has_a_counterexample():
    eye = torch.eye(2, dtype=torch.float64)
    bounds, kappas = [], []
    for c in (1, 100, 10_000):
        arguments = (eye, eye, eye, c * eye)
        bounds.append(sum(theorem_3_4_bounds(*arguments)).item())
        kappas.append(compute_condition_number(torch.cat(attention_jacobian(*arguments), 1)).item())
    assert bounds == pytest.approx([4.164] * 3, rel=1e-3)
    assert kappas == pytest.approx([2.476, 120.36, 12033.8], rel=1e-3)
