"""Bilinear samples as a sum over all pixels, for the operators' tests."""

import torch


def tent(distance: torch.Tensor) -> torch.Tensor:
    return (1 - distance.abs()).clamp(min=0)


def bilinear(maps: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sample maps (C, H, W), surrounded by zeros, at points of any shape: (C, *shape), differentiable by all three."""
    rows, columns = (torch.arange(size, dtype=maps.dtype) for size in maps.shape[1:])
    return torch.einsum('chw,...h,...w->c...', maps, tent(y[..., None] - rows), tent(x[..., None] - columns))


def assert_same_with_gradients(form, plain, *inputs: torch.Tensor, **tolerances) -> None:
    """Compare two functions of the same tensors, and their gradients with respect to each."""
    outputs = form(*inputs), plain(*inputs)
    torch.testing.assert_close(*outputs, **tolerances)
    weights = torch.randn_like(outputs[1])
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    for pair in zip(*(torch.autograd.grad((output * weights).sum(), leaves) for output in outputs)):
        torch.testing.assert_close(*pair, **tolerances)
