"""Detection and instance segmentation with a spectrally conditioned XCiT, on MMDetection.

Importing this package adds names to MMDetection's and MMEngine's registries and changes two things that are not its
own: where mmcv has no compiled operators, it provides those that Mask R-CNN needs (:mod:`spec_mmdet.startup`), and
MMEngine runs no code from checkpoints (:mod:`spec_mmdet.checkpoints.safe_loading`). Without MMDetection, only
:mod:`spec_mmdet.conditioning` can be used, which needs torch alone.
"""

from importlib import import_module
from importlib.util import find_spec

from . import startup
from .errors import InputError

__version__ = '0.1.0'
__all__ = ['InputError', '__version__']

startup.provide_operators()

# MMDetection takes seconds to import, which a command begins with only once it knows that it will run.
if not startup.is_command() and find_spec('mmdet') is not None:
    from . import registered
    from .registered import *  # noqa: F403

    __all__ += registered.__all__


def __getattr__(name: str) -> object:
    """Import what is registered when a command, or a module that it imports, asks for it."""
    if (name[0].isupper() or name == 'find_config') and find_spec('mmdet') is not None:
        names = import_module('.registered', __name__)
        if name in names.__all__:
            return getattr(names, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
