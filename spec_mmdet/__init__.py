"""Detection and instance segmentation with a spectrally conditioned XCiT, on MMDetection.

Importing this package adds names to MMDetection's and MMEngine's registries and changes two other packages: mmcv
without compiled operators gets those that Mask R-CNN needs (:mod:`spec_mmdet.startup`), and MMEngine no longer runs
code from checkpoints (:mod:`spec_mmdet.checkpoints.safe_loading`). Without MMDetection, only
:mod:`spec_mmdet.conditioning` can be used, which needs only torch.
"""

from importlib import import_module
from importlib.util import find_spec

from . import startup
from .errors import InputError

__version__ = '0.1.0'
__all__ = ['InputError', '__version__']

startup.provide_operators()

# Importing MMDetection takes seconds, so commands do it only after parsing their arguments.
if not startup.is_command() and find_spec('mmdet') is not None:
    from . import registered
    from .registered import *  # noqa: F403

    __all__ += registered.__all__


def __getattr__(name: str) -> object:
    """Import registered names on first use."""
    if (name[0].isupper() or name == 'find_config') and find_spec('mmdet') is not None:
        names = import_module('.registered', __name__)
        if name in names.__all__:
            return getattr(names, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
