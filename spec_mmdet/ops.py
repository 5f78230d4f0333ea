"""The compiled mmcv operators of Mask R-CNN and RetinaNet, nms, RoIAlign and the focal loss, served by torchvision.

Compiling mmcv is the hardest part of installing MMDetection; torchvision ships these operators, for CPU and CUDA, in
its wheels. Where mmcv has not been compiled, this file is its module ``mmcv._ext`` (see startup.py), so it imports
nothing of this package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision.ops
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes kept by non-maximum suppression, by falling score.

    Args:
        boxes: (n, 4), x1 y1 x2 y2.
        scores: (n,).
        iou_threshold: boxes that overlap a better one by more than this are dropped.
        offset: 1 where x2 and y2 are the last pixels inside the box, 0 where they are its edges.
    """
    corner = boxes.new_tensor([0, 0, offset, offset])
    # mmcv compares in single precision: boxes that overlap by exactly the threshold are kept.
    return torchvision.ops.nms(boxes + corner, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the pooled features of each region into ``output``, shape (n, C, aligned_height, aligned_width)."""
    if pool_mode != 1:
        raise NotImplementedError(_missing("roi_align with pool_mode='max'"))
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Add the gradient of the pooled features to ``grad_input``, shape (B, C, H, W)."""
    grad_input += torch.ops.torchvision._roi_align_backward(
        grad_output,
        rois,
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError(_missing('sigmoid_focal_loss with weights of classes'))
    classes = input.shape[1]
    one_hot = torch.nn.functional.one_hot(target, classes + 1)[:, :classes]
    return torchvision.ops.sigmoid_focal_loss(input, one_hot.to(input), alpha, gamma)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the focal loss (arXiv 1708.02002) of each class into ``output``.

    Args:
        input: logits, shape (n, classes).
        target: the class of each row, shape (n,); the number of classes where it is none of them.
        weight: empty.
        output: shape (n, classes).
        gamma: exponent that makes well-classified examples count less.
        alpha: weight of the target, 1 - alpha of the other classes.
    """
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative of each loss by its logit into ``grad_input``, shape (n, classes)."""
    with torch.enable_grad():
        input = input.detach().requires_grad_()
        loss = _focal_loss(input, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, input)[0])


def _missing(op: str) -> str:
    return (
        f'{op} is a compiled operator of mmcv that spec_mmdet does not provide (it provides nms, RoIAlign and the '
        f'focal loss through torchvision). Install a compiled mmcv, built for torch {torch.__version__}: '
        'https://mmcv.readthedocs.io/en/latest/get_started/installation.html'
    )


def __getattr__(name: str) -> Callable:
    # mmcv looks up every operator when it is imported and calls the few it needs, so that only a call is an error.
    if name.startswith('__'):
        raise AttributeError(name)

    def raise_missing(*args, **kwargs):
        raise NotImplementedError(_missing(name))

    return raise_missing
