"""Compare the two forms of XCA with each other and with the definition in float64."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_mmdet.models import products
from spec_mmdet.models.attention import XCA, compute_xca, compute_xca_by_gram
from spec_mmdet.models.products import KERNELS, linear


def arguments(B, N, heads, d, seed=0, scale=1.0, lam=0.0, kind='random'):
    """Draw tokens and weights of a realistic size, float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    C = heads * d
    x = dict(random=lambda: randn(B, N, C), zero=lambda: torch.zeros(B, N, C).double(), constant=lambda: randn(B, 1, 1))
    x = x[kind]().expand(B, N, C) * scale
    W = randn(3 * C, C) * C**-0.5 + lam * torch.eye(C).repeat(3, 1).double()
    return x, W, 0.1 * randn(3 * C), randn(C, C) * C**-0.5, 0.1 * randn(C), 0.5 + randn(heads, 1, 1).abs()


@given(B=st.integers(1, 3), N=st.integers(1, 40), C=st.integers(1, 12), D=st.integers(1, 12), own=st.booleans())
def test_linear_is_the_matrix_product(B, N, C, D, own):
    x, W, b = (torch.randn(shape, dtype=torch.float64) for shape in ((B, N, C), (B, D, C), (B, D)))
    expected = torch.einsum('bnc,bdc->bnd', x, W if own else W[:1].expand_as(W)) + (b if own else b[:1])[:, None]
    torch.testing.assert_close(linear(x, *((W, b) if own else (W[0], b[0]))), expected, rtol=0, atol=1e-12)


@given(
    B=st.integers(1, 3),
    N=st.integers(1, 300) | st.sampled_from([4096, 20_000]),
    heads=st.integers(1, 4),
    d=st.integers(1, 12),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e6]),
    lam=st.sampled_from([0.0, 1.0, 10.0]),
    kind=st.sampled_from(['random', 'zero', 'constant']),
)
@settings(max_examples=200)
def test_gram_form_equals_the_plain_form(**draw):
    given = arguments(**draw)
    plain, gram = compute_xca(*given), compute_xca_by_gram(*given)
    torch.testing.assert_close(gram, plain, rtol=0, atol=1e-10 * max(1, plain.abs().max().item()))


@pytest.mark.parametrize('kind', ['random', 'zero', 'constant'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kernels', list(product(KERNELS, KERNELS)))
def test_gradients_equal_those_of_the_plain_form(monkeypatch, kind, bias, kernels):
    monkeypatch.setattr(products, 'select_kernels', lambda x, shape: kernels)
    given = list(arguments(2, 50, 3, 4, lam=2.0, kind=kind))
    if not bias:
        given[2] = torch.zeros_like(given[2])
    direction = torch.randn(2, 50, 12, dtype=torch.float64)
    gradients = []
    for form in compute_xca, compute_xca_by_gram:
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        gradients.append(torch.autograd.grad(form(*leaves), leaves, direction))
    if kind == 'zero' and not bias:  # q and k are zero and have no direction
        for gradient in gradients[1]:
            assert gradient.isfinite().all()
        return
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_pass_gradcheck():
    given = [tensor.requires_grad_() for tensor in arguments(2, 9, 2, 2, lam=1.0)]
    assert torch.autograd.gradcheck(compute_xca_by_gram, given)


@pytest.mark.parametrize('lam', [0.0, 10.0])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
@pytest.mark.parametrize('N', [100, 1600, 20_000])
@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'float16', 'bfloat16 throughout'])
def test_errors_are_no_larger_than_the_plain_forms(N, lam, scale, precision):
    """On average the forms are equally exact at about 100 tokens of 48 channels; with more tokens Gram is better."""
    if precision == 'float16' and scale == 1e3 and lam:
        pytest.skip('the plain form overflows')
    dtype = getattr(torch, precision.split()[0])
    ratios = []
    for seed in range(6):
        exact = arguments(1, N, 4, 12, seed=seed, scale=scale, lam=lam)
        given = [tensor.to(dtype if 'throughout' in precision else torch.float32) for tensor in exact]
        if 'throughout' in precision:
            exact = [tensor.double() for tensor in given]
        expected = compute_xca(*exact)
        with torch.autocast('cpu', dtype, enabled=precision in ('bfloat16', 'float16')):
            plain, gram = (
                (form(*given).double() - expected).norm().item() for form in (compute_xca, compute_xca_by_gram)
            )
        ratios.append(gram / plain)
    assert sum(ratios) / len(ratios) <= (1.1 if N == 100 else 1.05)


@pytest.mark.parametrize('lam', [0.0, 10.0])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_errors_of_gradients_are_no_larger_under_autocast(dtype, lam):
    ratios = []
    for seed in range(4):
        exact = [tensor.requires_grad_() for tensor in arguments(1, 1600, 4, 12, seed=seed, lam=lam)]
        direction = torch.randn(1, 1600, 48, dtype=torch.float64)
        expected = torch.autograd.grad(compute_xca(*exact), exact, direction)
        errors = []
        for form in compute_xca, compute_xca_by_gram:
            leaves = [tensor.detach().float().requires_grad_() for tensor in exact]
            with torch.autocast('cpu', dtype):
                y = form(*leaves)
            assert y.dtype == dtype
            gradients = torch.autograd.grad(y, leaves, direction.to(dtype))
            errors.append([(own - right).norm() for own, right in zip(gradients, expected)])
        ratios.append([(gram / plain).item() for plain, gram in zip(*errors)])
    assert torch.tensor(ratios).mean(dim=0).max() <= 1.05


def test_the_module_chooses_the_form_by_the_number_of_tokens():
    module = XCA(8, 2, dict(type='identity', lam=2.0)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    gamma = torch.randn(8, dtype=torch.float64)
    for N in (1, 8, 15, 16, 17, 100):
        x = torch.randn(2, N, 8, dtype=torch.float64)
        W = module.qkv.weight + 2 * torch.eye(8).repeat(3, 1)
        parameters = (W, module.qkv.bias, module.proj.weight, module.proj.bias, module.temperature)
        torch.testing.assert_close(module(x, gamma), gamma * compute_xca(x, *parameters), rtol=0, atol=1e-10)
