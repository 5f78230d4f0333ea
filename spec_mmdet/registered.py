"""Import everything that this package registers with MMDetection's and MMEngine's registries."""

import mmdet.registry
from mmengine.registry import Registry

from .checkpoints import safe_loading  # noqa: F401, so that MMEngine runs no code from checkpoints
from .checkpoints.pretrained import XCiTPretrained
from .configs import find_config
from .data.images import CheckedLoadImageFromFile
from .data.masks import CheckedLoadAnnotations
from .data.panoptic import CheckedCocoPanopticDataset, CheckedLoadPanopticAnnotations
from .data.reading import CheckedCocoDataset
from .evaluation.accuracy import TopK
from .evaluation.drawing import LabelVisualizer, PictureHook
from .evaluation.metrics import CheckedCocoMetric, FastCocoMetric
from .evaluation.panoptic import PanopticQuality
from .evaluation.semantic import SemanticMetric
from .models.classifier import ImageClassifier, SpecXCiTClassifier
from .models.onnx import OnnxDetector
from .models.onnx_segmentor import OnnxSegmentor
from .models.padding import MaskedDataPreprocessor
from .models.tta import MaskTTAModel
from .models.xcit import SpecXCiT
from .training.exact import ExactEpochTrainLoop, ExactIterTrainLoop
from .training.guards import BufferGuard, CheckpointGuard, FiniteGuard, LoaderGuard
from .training.hooks import ConditioningHook, HistoryLimit, ScheduleGuard
from .training.optim import LayerDecayConstructor
from .training.results import ResultsHook
from .training.saving import AtomicCheckpointHook
from .training.schedule import WarmUpLR

__all__ = [
    'AtomicCheckpointHook',
    'BufferGuard',
    'CheckedCocoDataset',
    'CheckedCocoMetric',
    'CheckedCocoPanopticDataset',
    'CheckedLoadAnnotations',
    'CheckedLoadImageFromFile',
    'CheckedLoadPanopticAnnotations',
    'CheckpointGuard',
    'ConditioningHook',
    'ExactEpochTrainLoop',
    'ExactIterTrainLoop',
    'FastCocoMetric',
    'FiniteGuard',
    'HistoryLimit',
    'ImageClassifier',
    'LabelVisualizer',
    'LayerDecayConstructor',
    'LoaderGuard',
    'MaskTTAModel',
    'MaskedDataPreprocessor',
    'OnnxDetector',
    'OnnxSegmentor',
    'PanopticQuality',
    'PictureHook',
    'ResultsHook',
    'ScheduleGuard',
    'SemanticMetric',
    'SpecXCiT',
    'SpecXCiTClassifier',
    'TopK',
    'WarmUpLR',
    'XCiTPretrained',
    'find_config',
]

# Packages beside MMDetection, for instance MMSegmentation, find these names in MMEngine's registries.
for _registry in [found for found in vars(mmdet.registry).values() if isinstance(found, Registry) and found.parent]:
    for _name in _registry.module_dict.keys() & {*__all__} - _registry.parent.module_dict.keys():
        _registry.parent.register_module(_name, module=_registry.module_dict[_name])
