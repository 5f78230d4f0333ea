"""Detection and instance segmentation with a spectrally conditioned XCiT, on MMDetection.

Importing this package registers its modules with MMDetection's registries. Import it before ``mmdet.models`` or
``mmdet.apis``: where mmcv has no compiled operators, it provides the ones that Mask R-CNN needs. Without MMDetection,
``spec_mmdet.conditioning``, which needs torch alone, and ``spec_mmdet.jacobian``, which needs scipy too, are there.
"""

from importlib.util import find_spec

from .errors import InputError

__all__ = ['InputError']

if find_spec('mmdet') is not None:
    from . import ops

    ops.install()

    from .checkpoint import CheckpointGuard
    from .instruments import ConditioningHook
    from .metrics import FastCocoMetric
    from .padding import MaskedDataPreprocessor
    from .tta import MaskTTAModel
    from .xcit import SpecXCiT

    __all__ += ['CheckpointGuard', 'ConditioningHook', 'FastCocoMetric', 'MaskTTAModel', 'MaskedDataPreprocessor']
    __all__ += ['SpecXCiT']
