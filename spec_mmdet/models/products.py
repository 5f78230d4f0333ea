"""Matrix products and convolutions by the fastest CPU kernel; values and gradients are those of PyTorch's functions.

A product is computed by PyTorch's choice, MKL (``linear``), or by oneDNN as a 1 x 1 convolution (``convolution``). On
AMD processors either can be faster, up to twice, and not the same one for a product and for its gradients. Therefore
they are measured.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from ..compat import has_hooks
from ..errors import InputError

VARIABLE = 'SPEC_MMDET_PRODUCTS'  # environment variable that fixes the kernels
KERNELS = ('linear', 'convolution')
SHAPES = dict(widening=(384, 1536), narrowing=(1536, 384))  # channels before and after the measured products
TOKENS = 2048  # of the measured products: with 256, other kernels are faster than for large images
MARGIN = 0.95  # a convolution is chosen if it takes less than this part of the time
CHOSEN: dict[str, dict[str, list[str]]] = {}  # by setting and shape: the kernels, forward and backward

# Tokens per product in half precision: oneDNN sums them in float32 and rounds; the rounded sums are added in float32.
SLICE = 1024
WINDOWS = 2**21  # elements of a convolution's windows copied at a time, so that they fit in the cache


def is_eager_cpu(x: Tensor) -> bool:
    """Return whether x is on a CPU and operations on it are run, not compiled, exported or traced."""
    return x.device.type == 'cpu' and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def describe_setting(dtype: torch.dtype) -> str:
    """Return the dtype and number of threads of products, for which kernels are chosen."""
    return f'{str(dtype).removeprefix("torch.")}, {torch.get_num_threads()} threads'


def choose_kernels(dtype: torch.dtype) -> dict[str, list[str]]:
    """Return the kernels of products in float32 or bfloat16: of each shape in :data:`SHAPES`, forward and backward.

    They are chosen once per process and number of threads: by the environment variable :data:`VARIABLE`, or by
    measuring for about 0.6 s. With one thread PyTorch computes 1 x 1 convolutions by a slow kernel, so there is no
    choice.

    Raises:
        InputError: if the environment variable names no kernel.
    """
    setting = describe_setting(dtype)
    if setting in CHOSEN:
        return CHOSEN[setting]
    names = os.environ.get(VARIABLE, '')
    fixed = names.split(',')
    if names and (len(fixed) > 2 or {*fixed} - {*KERNELS}):
        raise InputError(f'{VARIABLE}={names}: use {" or ".join(KERNELS)}, or two of them as FORWARD,BACKWARD')
    if torch.get_num_threads() == 1 or not torch.backends.mkldnn.is_available():
        fixed = ['linear']
    if any(fixed):
        CHOSEN[setting] = dict.fromkeys(SHAPES, [fixed[0], fixed[-1]])
    else:  # in a new thread, which has none of this one's autocast, inference mode and counters of operations
        with ThreadPoolExecutor(1) as thread:
            CHOSEN[setting] = thread.submit(measure_kernels, dtype).result()
    return CHOSEN[setting]


def measure_kernels(dtype: torch.dtype) -> dict[str, list[str]]:
    """Time the kernels in turns on each shape, forward and backward, and return the fastest."""
    fastest = {}
    for shape, (C, D) in SHAPES.items():
        x, W, b = (torch.ones(size, dtype=dtype, requires_grad=True) for size in ((1, TOKENS, C), (D, C), (D,)))
        times = {kernel: [] for kernel in KERNELS}
        for kernel in 3 * KERNELS:
            start = time.perf_counter()
            y = multiply(x, W, b, kernel)
            middle = time.perf_counter()
            torch.autograd.grad(y, (x, W, b), y.detach())
            times[kernel].append((middle - start, time.perf_counter() - middle))
        linear, convolution = ([min(each) for each in zip(*times[kernel])] for kernel in KERNELS)
        fastest[shape] = [KERNELS[other < MARGIN * own] for own, other in zip(linear, convolution)]
    return fastest


def restore_kernels(chosen: object) -> None:
    """Set the kernels of a resumed training, :data:`CHOSEN` as a checkpoint contains it.

    Raises:
        InputError: if it contains anything else.
    """
    for setting, kernels in chosen.items() if isinstance(chosen, dict) else [(None, chosen)]:
        pairs = [kernels.get(shape) for shape in SHAPES] if isinstance(kernels, dict) else [None]
        if any(pair not in [[one, two] for one in KERNELS for two in KERNELS] for pair in pairs):
            raise InputError('the checkpoint: its "products" are no kernels. Use a checkpoint that train wrote')
        CHOSEN[setting] = kernels


def select_kernels(x: Tensor, shape: str) -> list[str]:
    """Return the kernels of a product with x and of its gradients; those of PyTorch's choice are 'linear'."""
    dtype = get_product_dtype(x)
    if not is_eager_cpu(x) or dtype not in (torch.float32, torch.bfloat16):
        return ['linear', 'linear']
    return choose_kernels(dtype)[shape]


def as_image(x: Tensor) -> Tensor:
    """View tokens, shape (B, N, C), as channels_last images one pixel high."""
    return x.mT.unsqueeze(2)


def multiply(x: Tensor, W: Tensor, b: Tensor | None, kernel: str) -> Tensor:
    """Compute ``x W^T + b`` by a kernel, for a W of shape (D, C)."""
    if kernel == 'linear':
        return F.linear(x, W, b)
    return F.conv2d(as_image(x), W[:, :, None, None], b).squeeze(2).mT


class _Linear(torch.autograd.Function):
    """``x W^T + b`` by one kernel, backward by the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None, kernel: str) -> Tensor:
        return multiply(x, W, b, kernel)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.kernel = inputs[3]

    @staticmethod
    def backward(ctx, by_y: Tensor) -> tuple:
        x, W = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if ctx.kernel == 'linear':
            image, by_image, kernel = as_image(x), as_image(by_y), W[:, :, None, None]
            shape = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, ..., groups
            by_x, by_W, by_b = torch.ops.aten.convolution_backward(by_image, image, kernel, [len(W)], *shape, wanted)
            return by_x.squeeze(2).mT if wanted[0] else None, by_W[..., 0, 0] if wanted[1] else None, by_b, None
        by_x = by_y @ W if wanted[0] else None
        by_W = by_y.flatten(0, 1).T @ x.flatten(0, 1) if wanted[1] else None
        return by_x, by_W, by_y.sum(dim=(0, 1)) if wanted[2] else None, None


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``x W^T + b``, shape (B, N, D), for tokens x, shape (B, N, C).

    Args:
        W: shape (D, C), or (B, D, C) with one matrix for each image.
        b: shape (D,) or None; with one matrix for each image, shape (B, D).
    """
    kernel, other = select_kernels(x, 'widening' if W.shape[-2] > W.shape[-1] else 'narrowing')
    if W.ndim == 3:
        if kernel == other == 'linear':
            return torch.baddbmm(b[:, None], x, W.mT)
        return torch.cat([linear(*own) for own in zip(x.split(1), W, b)])
    if kernel == other or not torch.is_grad_enabled():
        return multiply(x, W, b, kernel)
    dtype = get_product_dtype(x)
    return _Linear.apply(x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), kernel)


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
    if select_kernels(x, 'narrowing')[1] == 'linear':
        return x.mT @ x
    C = x.shape[2]  # the Gram matrix is the gradient of a 1 x 1 convolution with respect to its weight
    return torch.stack([conv2d_weight(row, (C, C, 1, 1), row)[..., 0, 0] for row in as_image(x).split(1)])


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
