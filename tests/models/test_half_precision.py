"""Features and gradients under autocast are at least as accurate as those of timm's XCiT with the same weights."""

import pytest

from benchmarks.half_precision import measure


@pytest.mark.parametrize('dtype', ['bf16', 'fp16'])
@pytest.mark.parametrize('gamma', ['initial', 'trained'])
@pytest.mark.parametrize('depth, eta', [(12, 1.0), (24, 1e-5)])
@pytest.mark.parametrize('side', [64, 192])  # the plain form of the attention, and the Gram form
def test_errors_are_no_larger_than_timms(depth, eta, gamma, dtype, side):
    arch = dict(dim=32, depth=depth, num_heads=4, eta=eta)
    ours, theirs = measure(arch, gamma, [dtype], 'cpu', side)
    assert 0 < ours['features'] <= 1.1 * theirs['features'] < 0.1
    assert 0 < ours['gradients'] <= 1.1 * theirs['gradients'] < 0.5
