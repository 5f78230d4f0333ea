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

# MMDetection takes seconds to import, which a command begins with only once it knows that it will run.
if find_spec('mmdet') is not None and not startup.is_command():
    from . import registered
    from .registered import *  # noqa: F403

    __all__ += registered.__all__
