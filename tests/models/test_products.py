"""Compare the faster convolutions with PyTorch's own, in values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec_mmdet.models import products
from spec_mmdet.models.products import Conv2d, Upsample, compute_gram

SIDES = st.integers(1, 9)


def assert_same_gradients(ours, theirs, x, by_y):
    """Compare the outputs of two modules with the same weights, and the gradients with respect to weights and input."""
    results = []
    for module in ours, theirs:
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        results.append([y, *torch.autograd.grad(y, leaves, by_y(y.shape))])
    for own, expected in zip(*results, strict=True):
        assert own.shape == expected.shape
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-10)


def normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


@given(B=st.integers(1, 3), C=SIDES, D=SIDES, h=SIDES, w=SIDES, scale=st.integers(1, 4), last=st.booleans())
def test_upsampling_is_a_transposed_convolution(B, C, D, h, w, scale, last):
    ours, theirs = Upsample(C, D, scale).double(), torch.nn.ConvTranspose2d(C, D, scale, scale).double()
    theirs.load_state_dict(ours.state_dict())
    x = normal(1)((B, C, h, w)).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert_same_gradients(ours, theirs, x, lambda shape: normal(2)(shape))


@given(B=st.integers(1, 3), D=SIDES, h=SIDES, w=SIDES, kernel=st.integers(1, 3), stride=st.integers(1, 3))
def test_convolution(B, D, h, w, kernel, stride):
    shape = dict(stride=stride, padding=kernel // 2, bias=False)
    ours, theirs = (kind(33, D, kernel, **shape).double() for kind in (Conv2d, torch.nn.Conv2d))
    theirs.load_state_dict(ours.state_dict())
    h, w = max(h, kernel), max(w, kernel)
    assert_same_gradients(ours, theirs, normal(1)((B, 33, h, w)), lambda shape: normal(2)(shape))


def test_gradients_keep_the_memory_format_of_their_tensor():
    """Otherwise all earlier layers would use the other layout, at a tenth of the speed."""
    for module in Conv2d(32, 16, 3, stride=2, padding=1, bias=False), Upsample(32, 16, 2):
        x = torch.randn(2, 32, 6, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = module(x)
        (by_x,) = torch.autograd.grad(y, x, torch.randn_like(y))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert by_x.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_a_weight_is_summed_over_parts_of_an_image(monkeypatch):
    monkeypatch.setattr(products, 'WINDOWS', 1000)
    x, by_y = normal(1)((2, 5, 31, 17)), normal(2)((2, 3, 16, 9))
    expected = torch.nn.grad.conv2d_weight(x, (3, 5, 3, 3), by_y, stride=2, padding=1)
    torch.testing.assert_close(products.compute_weight_gradient(x, by_y, 3, 2, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize('N', [1, 100, products.SLICE + 1, 8 * products.SLICE])
def test_products_of_bfloat16_add_up_in_float32(N):
    x = normal(N)((2, N, 24)).bfloat16()
    exact = x.double().mT @ x.double()
    error = compute_gram(x) - exact
    assert compute_gram(x).dtype == torch.float32
    assert (error.flatten(1).norm(dim=1) <= 2**-8 * exact.flatten(1).norm(dim=1)).all()
    if N > products.SLICE + 1:  # one product is rounded once by up to 2**-8, and the errors of several average out
        assert error.norm() < 0.6 * (x.mT @ x - exact).norm()
