"""Detection and instance segmentation with a spectrally conditioned XCiT, on MMDetection.

Importing this package registers its modules with MMDetection's registries and, where mmcv has no compiled operators,
provides the ones that Mask R-CNN needs. Without MMDetection, :mod:`spec_mmdet.conditioning` is there, which needs torch
alone.
"""

from importlib.util import find_spec

from . import startup
from .errors import InputError

__version__ = '0.1.0'
__all__ = ['InputError', '__version__']

startup.provide_operators()

if find_spec('mmdet') is not None:
    from .checkpoints.pretrained import StrictPretrainedInit
    from .configs import find_config
    from .data.images import LoadImageFromFile
    from .data.reading import CocoDataset
    from .evaluation.drawing import PictureHook
    from .evaluation.metrics import CocoMetric, FastCocoMetric
    from .models.onnx import OnnxDetector
    from .models.padding import MaskedDataPreprocessor
    from .models.tta import MaskTTAModel
    from .models.xcit import SpecXCiT
    from .training.exact import ExactTrainLoop
    from .training.guards import CheckpointGuard, FiniteGuard, LoaderGuard
    from .training.hooks import ConditioningHook, ScheduleGuard
    from .training.optim import LayerDecayConstructor
    from .training.saving import CheckpointHook
    from .training.schedule import WarmUpLR

    __all__ += ['CheckpointGuard', 'CheckpointHook', 'CocoDataset', 'CocoMetric', 'ConditioningHook', 'ExactTrainLoop']
    __all__ += ['FastCocoMetric', 'FiniteGuard', 'LayerDecayConstructor', 'LoadImageFromFile', 'LoaderGuard']
    __all__ += ['MaskTTAModel', 'MaskedDataPreprocessor', 'OnnxDetector', 'PictureHook', 'ScheduleGuard']
    __all__ += ['SpecXCiT', 'StrictPretrainedInit', 'WarmUpLR', 'find_config']
