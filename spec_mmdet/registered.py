"""All that this package registers with MMDetection's registries, by importing it."""

from .checkpoints.pretrained import StrictPretrainedInit
from .configs import find_config
from .data.images import LoadImageFromFile
from .data.reading import CocoDataset
from .evaluation.accuracy import TopK
from .evaluation.drawing import LabelVisualizer, PictureHook
from .evaluation.metrics import CocoMetric, FastCocoMetric
from .models.classifier import ImageClassifier, SpecXCiTClassifier
from .models.onnx import OnnxDetector
from .models.padding import MaskedDataPreprocessor
from .models.tta import MaskTTAModel
from .models.xcit import SpecXCiT
from .training.exact import ExactTrainLoop
from .training.guards import CheckpointGuard, FiniteGuard, LoaderGuard
from .training.hooks import ConditioningHook, ScheduleGuard
from .training.optim import LayerDecayConstructor
from .training.results import ResultsHook
from .training.saving import CheckpointHook
from .training.schedule import WarmUpLR

__all__ = ['CheckpointGuard', 'CheckpointHook', 'CocoDataset', 'CocoMetric', 'ConditioningHook', 'LabelVisualizer']
__all__ += [
    'ExactTrainLoop',
    'FastCocoMetric',
    'FiniteGuard',
    'ImageClassifier',
    'LayerDecayConstructor',
    'LoadImageFromFile',
    'LoaderGuard',
]
__all__ += ['MaskTTAModel', 'MaskedDataPreprocessor', 'OnnxDetector', 'PictureHook', 'ResultsHook']
__all__ += ['ScheduleGuard', 'SpecXCiT', 'SpecXCiTClassifier']
__all__ += ['StrictPretrainedInit', 'TopK', 'WarmUpLR', 'find_config']
