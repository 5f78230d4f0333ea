"""Compare the faster convolutions with PyTorch's own, in values and gradients."""

import time
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spec_mmdet.errors import InputError
from spec_mmdet.models import products
from spec_mmdet.models.products import (
    CHOSEN,
    KERNELS,
    SHAPES,
    Conv2d,
    Upsample,
    choose_kernels,
    compute_gram,
    linear,
    restore_kernels,
)

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


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, for which no kernel is chosen yet."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, 'CHOSEN', {})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize('kernels', list(product(KERNELS, KERNELS)))
@pytest.mark.parametrize('B, N, C, D', [(1, 50, 8, 24), (3, 7, 24, 8), (2, 9, 8, 8)])
@pytest.mark.parametrize('bias', [True, False])
def test_all_kernels_compute_the_product(monkeypatch, two_threads, kernels, B, N, C, D, bias):
    monkeypatch.setenv(products.VARIABLE, ','.join(kernels))
    exact = [normal(i)(shape).requires_grad_() for i, shape in enumerate([(B, N, C), (D, C), (D,)])]
    if not bias:
        exact[2] = None
    rounded = [each if each is None else each.detach().float().requires_grad_() for each in exact]
    by_y = normal(4)((B, N, D))
    y, expected = linear(*rounded), torch.einsum('bnc,dc->bnd', *exact[:2]) + (exact[2] if bias else 0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(y, rounded[: 2 + bias], by_y.float()),
        torch.autograd.grad(expected, exact[: 2 + bias], by_y),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4)


def test_the_faster_kernel_is_chosen_once_forward_and_backward(monkeypatch, two_threads):
    monkeypatch.setattr(products, 'SHAPES', dict(widening=(8, 32), narrowing=(32, 8)))
    calls, multiply = [], products.multiply

    def multiply_slowly(x, W, b, kernel):
        calls.append(kernel)
        slow = 'linear' if len(W) == 32 else 'convolution'  # forward; the other one is slow backward
        if kernel == slow:
            time.sleep(0.02)
        y = multiply(x, W, b, kernel)
        if kernel != slow:
            y.register_hook(lambda by_y: time.sleep(0.02))
        return y

    monkeypatch.setattr(products, 'multiply', multiply_slowly)
    assert choose_kernels(torch.float32) == dict(
        widening=['convolution', 'linear'], narrowing=['linear', 'convolution']
    )
    measured = len(calls)
    choose_kernels(torch.float32)
    assert len(calls) == measured > 0


def test_one_thread_never_uses_the_slow_convolution(monkeypatch, two_threads):
    monkeypatch.setenv(products.VARIABLE, 'convolution')
    assert choose_kernels(torch.float32) == dict.fromkeys(SHAPES, ['convolution', 'convolution'])
    torch.set_num_threads(1)
    assert choose_kernels(torch.float32) == dict.fromkeys(SHAPES, ['linear', 'linear'])
    x = torch.ones(1, 9, 8)
    with torch.profiler.profile() as profile:
        linear(x, torch.ones(24, 8))
        compute_gram(x)
    assert not [event.key for event in profile.key_averages() if 'conv' in event.key]


@pytest.mark.parametrize('names', ['mkl', 'linear,', 'linear,linear,linear'])
def test_a_wrong_kernel_is_an_error(monkeypatch, two_threads, names):
    monkeypatch.setenv(products.VARIABLE, names)
    with pytest.raises(InputError, match=f'{products.VARIABLE}={names}: '):
        choose_kernels(torch.float32)


class Product(torch.nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


@pytest.mark.parametrize('trace', [torch.export.export, partial(torch.jit.trace, check_trace=False)])
def test_nothing_is_measured_for_a_graph(monkeypatch, two_threads, trace):
    monkeypatch.setattr(products, 'measure_kernels', lambda dtype: pytest.fail('measured'))
    trace(Product(8, 8), (torch.ones(1, 9, 8),))


def test_measuring_is_not_counted_and_draws_no_random_numbers(two_threads):
    x, W, seed = torch.ones(1, 9, 8), torch.ones(24, 8), torch.get_rng_state()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.inference_mode():
        linear(x, W)
    assert counter.get_total_flops() == 2 * 9 * 8 * 24
    assert torch.equal(torch.get_rng_state(), seed) and products.CHOSEN


@pytest.mark.parametrize(
    'forged', [3, {'float32, 2 threads': 'linear'}, {'float32, 2 threads': dict(widening=['x', 'y'])}]
)
def test_forged_kernels_are_an_error(forged):
    before = dict(CHOSEN)
    with pytest.raises(InputError, match='products'):
        restore_kernels(forged)
    assert before == CHOSEN
