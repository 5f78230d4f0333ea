"""Matrix products and convolutions, dispatched to the fastest CPU kernel.

Values and gradients are those of PyTorch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..compat import has_hooks

# Tokens per product in half precision: oneDNN sums them in float32 and rounds; the rounded sums are added in float32.
SLICE = 1024
WINDOWS = 2**21  # elements of a convolution's windows copied at a time, so that they fit in the cache


def uses_onednn(x: Tensor) -> bool:
    """Return whether products with x are computed by oneDNN, as 1 x 1 convolutions, instead of by PyTorch's choice.

    PyTorch chooses MKL on a CPU, which can take twice as long as oneDNN on an AMD processor. Under autocast to bfloat16
    PyTorch chooses oneDNN, too, but adds the bias in a separate pass.
    """
    if torch.compiler.is_compiling() or x.device.type != 'cpu' or not torch.backends.mkldnn.is_available():
        return False
    if torch.is_autocast_enabled('cpu'):
        return get_product_dtype(x) == torch.bfloat16
    return x.dtype in (torch.float32, torch.float64)


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + b``, shape (B, N, D), for tokens x, shape (B, N, C).

    Args:
        W: shape (D, C), or (B, D, C) with one matrix for each image.
        b: shape (D,) or None; with one matrix for each image, shape (B, D).
    """
    if not uses_onednn(x):
        return F.linear(x, W, b) if W.ndim == 2 else torch.baddbmm(b[:, None], x, W.mT)
    if W.ndim == 2:  # the tokens are a channels_last image one pixel high
        return F.conv2d(x.mT.unsqueeze(2), W[:, :, None, None], b).squeeze(2).mT
    ys = [linear(*own) for own in zip(x.split(1), W, b)]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


def compute_gram(x: Tensor) -> Tensor:
    """Compute ``x^T x`` of each image's tokens x, shape (B, N, C), in float32 at least: shape (B, C, C).

    Tokens in half precision are multiplied as they are, and the products summed in float32.
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        if x.device.type == 'cuda' and 'dtype' in torch.ops.aten.bmm.overloads():
            return torch.bmm(x.mT, x, out_dtype=torch.float32)
        if x.dtype == torch.bfloat16:  # float16 could overflow
            return torch.stack([(part.mT @ part).float() for part in x.split(SLICE, dim=1)]).sum(dim=0)
        x = x.float()
    if not uses_onednn(x):
        return x.mT @ x
    C = x.shape[2]  # the Gram matrix is the gradient of a 1 x 1 convolution with respect to its weight
    return torch.stack([conv2d_weight(row, (C, C, 1, 1), row)[..., 0, 0] for row in x.mT.unsqueeze(2).split(1)])


def compute_weight_gradient(x: Tensor, by_y: Tensor, kernel: int, stride: int, padding: int = 0) -> Tensor:
    """Compute the gradient of a convolution with respect to its weight as a matrix product.

    oneDNN's own kernel takes up to three times as long if x is channels_last.

    Args:
        x: shape (B, C, H, W).
        by_y: the gradient with respect to the output, shape (B, D, h, w).
        kernel, stride, padding: of the convolution, equal in both directions.
    """
    windows = F.pad(x, (padding,) * 4).unfold(2, kernel, stride).unfold(3, kernel, stride)
    windows = windows.permute(0, 2, 3, 4, 5, 1)  # (B, h, w, kernel, kernel, C): the inputs of each output
    by_y = by_y.permute(0, 2, 3, 1)
    shape = windows.shape[3:]
    rows = max(1, WINDOWS // (windows.shape[2] * shape.numel()))
    exact = torch.promote_types(by_y.dtype, torch.float32)
    by_W = by_y.new_zeros(by_y.shape[3], shape.numel(), dtype=exact)
    for own in zip(windows, by_y):
        for seen, by_rows in zip(*(each.split(rows) for each in own)):
            by_W += by_rows.flatten(0, 1).T @ seen.reshape(-1, shape.numel())
    return by_W.to(x.dtype).unflatten(1, shape).permute(0, 3, 1, 2)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, W: Tensor, stride: int, padding: int) -> Tensor:
        return F.conv2d(x, W, None, stride, padding)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, by_y: Tensor) -> tuple:
        x, W = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[0]:  # computed from x, so that it has the memory format of x
            by_x, _, _ = torch.ops.aten.convolution_backward(
                by_y, x, W, None, [ctx.stride] * 2, [ctx.padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
            )
        shape = W.shape[2], ctx.stride, ctx.padding
        return by_x, compute_weight_gradient(x, by_y, *shape) if ctx.needs_input_grad[1] else None, None, None


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return F.conv_transpose2d(x, W, b, stride=W.shape[2])

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, by_y: Tensor) -> tuple:
        x, W = ctx.saved_tensors
        kernel = W.shape[2]
        by_x = F.conv2d(by_y, W, stride=kernel) if ctx.needs_input_grad[0] else None
        by_W = compute_weight_gradient(by_y, x, kernel, kernel) if ctx.needs_input_grad[1] else None
        return by_x, by_W, by_y.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None


def get_product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with x are computed: autocast's, if it is enabled, or that of x."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class Conv2d(nn.Conv2d):
    """Convolution with a square kernel, fast if it has no bias (a fused normalisation adds one)."""

    def forward(self, x: Tensor) -> Tensor:
        # With few input channels, copying the windows takes longer than multiplying them.
        small = self.in_channels < 32 or self.bias is not None
        if torch.compiler.is_compiling() or x.device.type != 'cpu' or small:
            return super().forward(x)
        dtype = get_product_dtype(x)
        return _Convolution.apply(x.to(dtype), self.weight.to(dtype), self.stride[0], self.padding[0])


class Upsample(nn.ConvTranspose2d):
    """Transposed convolution whose kernel and stride are ``scale``: each pixel becomes scale x scale pixels."""

    def __init__(self, c_in: int, c_out: int, scale: int) -> None:
        super().__init__(c_in, c_out, scale, scale)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or x.device.type != 'cpu':
            return super().forward(x)
        dtype = get_product_dtype(x)
        return _Transposed.apply(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


def is_plain(*layers: nn.Module) -> bool:
    """Return whether layers compute only what their weight and bias define, so that a faster function can replace them.

    A layer with a hook, an adapter (LoRA) or its own forward must be called as a module.
    """
    plain = (nn.Linear.forward, nn.Conv2d.forward, Conv2d.forward)
    return all(
        type(layer).forward in plain and 'forward' not in vars(layer) and not has_hooks(layer) for layer in layers
    )


def scale_output(layer: nn.Linear | nn.Conv2d, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias with its output channels scaled by gamma, shape (C,)."""
    return layer.weight * gamma.view(-1, *[1] * (layer.weight.ndim - 1)), layer.bias * gamma
