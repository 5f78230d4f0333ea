"""Compare CARAFE and masked convolutions, through mmcv's own functions, with plain sums."""

import mmcv.ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import assert_same_with_gradients


def plain_carafe(features, masks, kernel, groups, scale):
    """Compute each pixel of the result alone: its kernel times the features around the pixel that contains it."""
    n, channels, height, width = features.shape
    each, half = channels // groups, kernel // 2
    masks = masks.unflatten(1, (groups, kernel, kernel))
    rows = []
    for y in range(height * scale):
        for x in range(width * scale):
            total = torch.zeros(n, channels, dtype=features.dtype)
            for i in range(kernel):
                for j in range(kernel):
                    row, column = y // scale + i - half, x // scale + j - half
                    if 0 <= row < height and 0 <= column < width:
                        factor = masks[:, :, i, j, y, x].repeat_interleave(each, dim=1)
                        total = total + features[:, :, row, column] * factor
            rows.append(total)
    return torch.stack(rows, dim=2).view(n, channels, height * scale, width * scale)


@settings(max_examples=10)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 3, 5]), st.integers(1, 2), st.integers(1, 2),
    st.integers(1, 3),
)  # fmt: skip
def test_carafe(height, width, kernel, groups, channels, scale):
    features = torch.randn(2, groups * channels, height, width, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(2, groups * kernel**2, height * scale, width * scale, dtype=torch.float64, requires_grad=True)
    arguments = (kernel, groups, scale)
    assert_same_with_gradients(
        lambda *inputs: mmcv.ops.carafe(*inputs, *arguments),
        lambda *inputs: plain_carafe(*inputs, *arguments),
        features,
        masks,
    )


@pytest.mark.parametrize('kernel, padding', [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((3, 5), (1, 2)), ((1, 3), (0, 1))])
def test_masked_convolution(kernel, padding):
    conv = mmcv.ops.MaskedConv2d(3, 4, kernel, padding=padding)
    image, mask = torch.randn(1, 3, 6, 7), torch.rand(1, 6, 7) > 0.6
    with torch.no_grad():
        expected = torch.nn.functional.conv2d(image, conv.weight, conv.bias, padding=padding) * mask[:, None]
        torch.testing.assert_close(conv(image, mask), expected)
        assert not conv(image, torch.zeros_like(mask)).any()
