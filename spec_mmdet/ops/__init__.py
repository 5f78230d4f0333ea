"""Replacements for the compiled mmcv operators that MMDetection's detectors need, in torchvision and PyTorch.

Compiling mmcv is the hardest part of installing MMDetection; torchvision ships some of its operators, for CPU and CUDA,
in its wheels, and PyTorch computes the others. Where mmcv has not been compiled, this package is its module
``mmcv._ext`` (see startup.py), so it imports nothing of the package around it. The names and arguments are mmcv's
(``**_`` collects the settings that an operator does not need), the results those of its kernels; half-precision tensors
are computed with in single precision (precision.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import boxes, deformable, focal_loss, normalisation, reassembly, regions

OPERATORS = {
    name: operator
    for module in (boxes, deformable, focal_loss, normalisation, reassembly, regions)
    for name, operator in vars(module).items()
    if getattr(operator, '__module__', None) == module.__name__ and not name.startswith('_')
}


def __getattr__(name: str) -> Callable:
    if name in OPERATORS:
        return OPERATORS[name]
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
