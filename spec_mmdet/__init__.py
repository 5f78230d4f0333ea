"""Detection and instance segmentation with a spectrally conditioned XCiT, on MMDetection.

Importing this package registers its modules with MMDetection's registries. Import it before ``mmdet.models`` or
``mmdet.apis``: where mmcv has no compiled operators, it provides the ones that Mask R-CNN needs.
"""

from . import ops

ops.install()

from .checkpoint import CheckpointGuard  # noqa: E402
from .errors import InputError  # noqa: E402
from .tta import MaskTTAModel  # noqa: E402
from .xcit import SpecXCiT  # noqa: E402

__all__ = ['CheckpointGuard', 'InputError', 'MaskTTAModel', 'SpecXCiT']
