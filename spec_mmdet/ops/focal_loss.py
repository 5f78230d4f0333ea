"""Focal loss (arXiv 1708.02002) of sigmoids, and its derivative.

Both are in closed form: autograd returns NaN if a probability rounds to 1 and gamma < 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def _row_weights(weight: Tensor, target: Tensor) -> Tensor | float:
    """Return the weight of each row's class, shape (n, 1); 1 if it has none (mmcv's kernels read out of bounds)."""
    if not weight.numel():
        return 1.0
    is_class = (target >= 0) & (target < len(weight))
    return torch.where(is_class, weight[target.where(is_class, 0)], 1)[:, None]


def _sigmoids(input: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Return p, log p, 1 - p, log (1 - p) of each logit, and whether its class is that of the row."""
    classes = input.shape[1]
    if target.device.type == 'cpu' and target.numel() and target.max() > classes:  # on a GPU this would synchronise
        raise ValueError(f'focal loss: a target is {target.max()}, but there are only {classes} classes')
    (x,) = widen(input)
    is_target = target[:, None] == torch.arange(classes, device=target.device)
    return x.sigmoid(), F.logsigmoid(x), (-x).sigmoid(), F.logsigmoid(-x), is_target


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss of each class into ``output``.

    Args:
        input: logits, shape (n, classes).
        target: class of each row, shape (n,). For the number of classes or -1, the row is a negative of each class.
        weight: weights of the classes, shape (classes,), or empty; rows without class have weight 1.
        output: shape (n, classes).
        gamma: exponent that makes well-classified examples count less.
        alpha: weight of the target, 1 - alpha of the other classes.

    Raises:
        ValueError: on a CPU, for a target above the number of classes; on a GPU it is a negative, as in mmcv.
    """
    p, log_p, q, log_q, is_target = _sigmoids(input, target)
    loss = torch.where(is_target, -alpha * q**gamma * log_p, (alpha - 1) * p**gamma * log_q)
    output.copy_(loss * _row_weights(weight, target))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss with respect to its logit into ``grad_input``, shape (n, classes)."""
    p, log_p, q, log_q, is_target = _sigmoids(input, target)
    positive = -alpha * q**gamma * (q - gamma * p * log_p)
    negative = (alpha - 1) * p**gamma * (gamma * q * log_q - p)
    grad_input.copy_(torch.where(is_target, positive, negative) * _row_weights(weight, target))
