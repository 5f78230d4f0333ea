"""mmcv's compiled operators, where mmcv has none: ``mmcv._ext`` is then :mod:`spec_mmdet.ops`.

``import spec_mmdet`` runs this, and so does every start of Python in an environment where this package is installed
(spec_mmdet.pth), so that MMDetection's own scripts find the operators too, whatever is imported first. Nothing of mmcv,
torch or this package is imported by it, nor anything else that takes milliseconds: it is one more place to look for
``mmcv._ext``, after all others, so that a compiled one always comes first.
"""

import os
import sys


class OperatorFinder:
    """The finder, in the sense of ``sys.meta_path``, of ``mmcv._ext``."""

    serves = 'mmcv._ext'

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """The module's spec: the package ops/, which needs nothing else of this one."""
        if name == cls.serves:
            from importlib.util import spec_from_file_location

            ops = os.path.join(os.path.dirname(__file__), 'ops')
            return spec_from_file_location(name, os.path.join(ops, '__init__.py'), submodule_search_locations=[ops])
        return None


def provide_operators() -> None:
    """Have Python look for ``mmcv._ext`` here in the end, once."""
    if not any(getattr(finder, 'serves', None) == OperatorFinder.serves for finder in sys.meta_path):
        sys.meta_path.append(OperatorFinder)


def is_command() -> bool:
    """Whether this process is ``spec-mmdet``, or ``python -m spec_mmdet``."""
    module = [*sys.orig_argv, ''][sys.orig_argv.index('-m') + 1] if '-m' in sys.orig_argv else ''
    return module == 'spec_mmdet' or os.path.splitext(os.path.basename(sys.argv[0]))[0] == 'spec-mmdet'
