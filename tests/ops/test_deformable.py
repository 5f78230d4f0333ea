"""Compare deformable attention and convolutions, through mmcv's own functions, with plain bilinear samples."""

import mmcv.ops
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from plain import assert_same_with_gradients, bilinear

few = settings(max_examples=15)


def plain_attention(value, sizes, locations, weights):
    """Compute each query of each head alone, (B, queries, heads * d); a map's pixel i is at (i + 1/2) / size."""
    batch, queries, heads = weights.shape[:3]
    rows = []
    for b in range(batch):
        for q in range(queries):
            for head in range(heads):
                total, start = 0, 0
                for level, (height, width) in enumerate(sizes):
                    maps = value[b, start : start + height * width, head].T.unflatten(1, (height, width))
                    x, y = locations[b, q, head, level].T
                    samples = bilinear(maps, y * height - 0.5, x * width - 0.5)
                    total = total + samples @ weights[b, q, head, level]
                    start += height * width
                rows.append(total)
    return torch.cat(rows).view(batch, queries, -1)


def attend(value, sizes, locations, weights):
    """Call mmcv's operator as mmcv does for CUDA tensors."""
    shapes = torch.tensor(sizes)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), shapes.prod(1).cumsum(0)[:-1]])
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


def attention_inputs(batch, queries, heads, d, sizes, points):
    keys = sum(height * width for height, width in sizes)
    value = torch.randn(batch, keys, heads, d, dtype=torch.float64, requires_grad=True)
    # A third of the places are outside.
    locations = torch.rand(batch, queries, heads, len(sizes), points, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.randn(batch, queries, heads, len(sizes), points, dtype=torch.float64, requires_grad=True)
    return value, locations.requires_grad_(), weights


@few
@given(
    st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.integers(1, 3),
)  # fmt: skip
def test_multi_scale_deformable_attention(batch, queries, heads, d, sizes, points):
    inputs = attention_inputs(batch, queries, heads, d, sizes, points)
    assert_same_with_gradients(
        lambda value, *others: attend(value, sizes, *others),
        lambda value, *others: plain_attention(value, sizes, *others),
        *inputs,
    )


def test_multi_scale_deformable_attention_equals_mmcvs_on_cpu():
    sizes = [(6, 4), (3, 2), (1, 2)]
    assert_same_with_gradients(
        lambda value, *others: attend(value, sizes, *others),
        lambda value, *others: multi_scale_deformable_attn_pytorch(value, torch.tensor(sizes), *others),
        *attention_inputs(2, 5, 2, 4, sizes, 3),
    )


def test_multi_scale_deformable_attention_in_half_precision():
    """Under autocast mmcv rounds locations and weights to the type of the values."""
    sizes = [(6, 4), (3, 2)]
    inputs = [tensor.detach().bfloat16() for tensor in attention_inputs(2, 5, 2, 4, sizes, 3)]
    half, single = (
        [tensor.to(dtype).requires_grad_() for tensor in inputs] for dtype in (torch.bfloat16, torch.float32)
    )
    outputs = [attend(value, sizes, *others) for value, *others in (half, single)]
    assert outputs[0].dtype == torch.bfloat16 and torch.equal(outputs[0], outputs[1].bfloat16())
    gradients = [torch.autograd.grad(output.sum(), tensors) for output, tensors in zip(outputs, (half, single))]
    for of_half, of_single in zip(*gradients):
        assert torch.equal(of_half, of_single.bfloat16())


def plain_deform_conv(input, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """A convolution of samples: at each kernel position the whole map is sampled at displaced pixels."""
    kernel, (rows, columns) = weight.shape[2:], offset.shape[2:]
    offset = offset.unflatten(1, (deform_groups, *kernel, 2))
    mask = mask.unflatten(1, (deform_groups, *kernel))
    y0, x0 = (torch.arange(n) * s - p for n, s, p in zip((rows, columns), stride, padding))
    sampled = []
    for image, by, factor in zip(input, offset, mask):
        for maps, group_by, group_factor in zip(image.chunk(deform_groups), by, factor):
            for i in range(kernel[0]):
                for j in range(kernel[1]):
                    y = y0[:, None] + i * dilation[0] + group_by[i, j, 0]
                    x = x0 + j * dilation[1] + group_by[i, j, 1]
                    sampled.append(bilinear(maps, y, x) * group_factor[i, j])
    shape = (len(input), deform_groups, *kernel, -1, rows, columns)
    sampled = torch.stack(sampled).view(shape).permute(0, 1, 4, 2, 3, 5, 6).flatten(1, 2)  # (B, C, k, k, H, W)
    outputs = []
    for maps, filters in zip(sampled.chunk(groups, dim=1), weight.chunk(groups)):
        outputs.append(torch.einsum('bcijhw,ocij->bohw', maps, filters))
    return torch.cat(outputs, dim=1) + bias[:, None, None]


@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(1, 2), st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_deformable_convolutions(kernel, stride, padding, dilation, groups, deform_groups, bias):
    height, width = 6, 7
    rows, columns = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((height, width), padding, dilation, kernel, stride)
    )

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    places = deform_groups * kernel[0] * kernel[1]
    input, weight = leaf(2, 4, height, width), leaf(6, 4 // groups, *kernel)
    offset, mask, shift = leaf(2, 2 * places, rows, columns), leaf(2, places, rows, columns), leaf(6)
    settings = (stride, padding, dilation, groups, deform_groups)

    zeros, ones = torch.zeros(6, dtype=torch.float64), torch.ones_like(mask)
    assert_same_with_gradients(
        lambda input, offset, weight: mmcv.ops.deform_conv2d(input, offset, weight, *settings),
        lambda input, offset, weight: plain_deform_conv(input, offset, ones, weight, zeros, *settings),
        input,
        offset,
        weight,
    )
    if bias:
        assert_same_with_gradients(
            lambda *inputs: mmcv.ops.modulated_deform_conv2d(*inputs, *settings),
            lambda *inputs: plain_deform_conv(*inputs, *settings),
            *(input, offset, mask, weight, shift),
        )
    else:
        assert_same_with_gradients(
            lambda *inputs: mmcv.ops.modulated_deform_conv2d(*inputs, None, *settings),
            lambda *inputs: plain_deform_conv(*inputs, zeros, *settings),
            *(input, offset, mask, weight),
        )


def test_larger_offsets_are_read_as_in_mmcv():
    """The kernels read offsets and factors in the output's size, image by image, as DyHead passes them."""
    input, weight = torch.randn(2, 2, 4, 5, dtype=torch.float64), torch.randn(3, 2, 3, 3, dtype=torch.float64)
    offset, mask = (torch.randn(2, n, 8, 10, dtype=torch.float64, requires_grad=True) for n in (18, 9))
    assert_same_with_gradients(
        lambda offset, mask: mmcv.ops.modulated_deform_conv2d(input, offset, mask, weight, None, 1, 1),
        lambda offset, mask: mmcv.ops.modulated_deform_conv2d(
            input,
            torch.stack([image.reshape(-1)[: 18 * 20].view(18, 4, 5) for image in offset]),
            torch.stack([image.reshape(-1)[: 9 * 20].view(9, 4, 5) for image in mask]),
            weight,
            None,
            1,
            1,
        ),
        offset,
        mask,
    )


def test_gradients_at_zero_offsets_equal_mmcvs():
    """At offsets of 0 each sample is at a kink: the gradient is the slope to the right, and 0 outside the map."""
    input, weight = torch.randn(1, 2, 3, 4, dtype=torch.float64), torch.randn(3, 2, 2, 3, dtype=torch.float64)
    stride, padding, dilation, step = (1, 2), (1, 2), (1, 2), 1e-3
    offset = torch.zeros(1, 12, 4, 2, dtype=torch.float64, requires_grad=True)
    output = mmcv.ops.deform_conv2d(input, offset, weight, stride, padding, dilation)
    weights = torch.randn_like(output)
    (gradient,) = torch.autograd.grad((output * weights).sum(), offset)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in offset.shape[1:])).tolist():
        place, axis = divmod(index[0], 2)
        at = index[1 + axis] * stride[axis] - padding[axis] + divmod(place, 3)[axis] * dilation[axis]
        moved = offset.detach().clone()
        moved[0][tuple(index)] += step
        ahead = mmcv.ops.deform_conv2d(input, moved, weight, stride, padding, dilation)
        slope = ((ahead - output) * weights).sum() / step
        torch.testing.assert_close(gradient[0][tuple(index)], slope if at > -1 else torch.zeros_like(slope))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_deformable_convolutions_in_half_precision(dtype):
    """Computed in single precision, with and without autocast."""

    def inputs(dtype):
        torch.manual_seed(1)
        shapes = (1, 4, 6, 7), (1, 18, 6, 7), (1, 9, 6, 7), (6, 4, 3, 3), (6,)
        return [torch.randn(shape).to(half).to(dtype).requires_grad_() for shape in shapes]

    half = dtype
    mixed, single = inputs(half), inputs(torch.float32)
    outputs = [mmcv.ops.modulated_deform_conv2d(*tensors, 1, 1, 1, 1, 1) for tensors in (mixed, single)]
    assert outputs[0].dtype == dtype and torch.equal(outputs[0], outputs[1].to(dtype))
    with torch.autocast('cpu', dtype):
        assert torch.equal(mmcv.ops.modulated_deform_conv2d(*single, 1, 1, 1, 1, 1), outputs[1])
    gradients = [torch.autograd.grad(output.sum(), tensors) for output, tensors in zip(outputs, (mixed, single))]
    for of_half, of_single in zip(*gradients):
        torch.testing.assert_close(of_half, of_single.to(dtype))
