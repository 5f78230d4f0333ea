"""Replacements for the compiled mmcv operators that MMDetection's detectors need, in torchvision and PyTorch.

Compiling mmcv is the hardest part of installing MMDetection; torchvision ships some of its operators, for CPU and CUDA,
in its wheels, and PyTorch computes the others. Where mmcv has not been compiled, this package is its module
``mmcv._ext`` (see startup.py), so it imports nothing of the package around it. The names and arguments are mmcv's, the
results those of its kernels; half-precision tensors are computed with in single precision (precision.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .boxes import nms, nms_match, softnms
from .deformable import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    ms_deform_attn_backward,
    ms_deform_attn_forward,
)
from .focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .normalisation import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)
from .reassembly import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    masked_col2im_forward,
    masked_im2col_forward,
)
from .regions import (
    deform_roi_pool_backward,
    deform_roi_pool_forward,
    roi_align_backward,
    roi_align_forward,
)

__all__ = [
    'carafe_backward',
    'carafe_forward',
    'carafe_naive_backward',
    'carafe_naive_forward',
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'deform_roi_pool_backward',
    'deform_roi_pool_forward',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
    'sync_bn_backward_data',
    'sync_bn_backward_param',
    'sync_bn_forward_mean',
    'sync_bn_forward_output',
    'sync_bn_forward_var',
]


def __getattr__(name: str) -> Callable:
    # mmcv looks up every operator at import and calls few of them, so only a call is an error.
    if name.startswith('__'):
        raise AttributeError(name)

    def raise_missing(*args, **kwargs):
        raise NotImplementedError(
            f'{name} is a compiled operator of mmcv that spec_mmdet does not provide (no detector that MMDetection '
            f'ships needs it). Install a compiled mmcv, built for torch {torch.__version__}: '
            'https://mmcv.readthedocs.io/en/latest/get_started/installation.html'
        )

    return raise_missing
