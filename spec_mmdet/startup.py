"""Provide mmcv's compiled operators if mmcv has none: ``mmcv._ext`` is then :mod:`spec_mmdet.ops`.

``import spec_mmdet`` runs this module, and so does every start of Python in an environment where this package is
installed (spec_mmdet.pth). MMDetection's own scripts therefore find the operators, whatever they import first. The
finder comes last, so a compiled module has priority. To keep the start of Python fast, this module imports neither
mmcv nor torch nor the rest of the package.
"""

import os
import sys


class OperatorFinder:
    """Finder of ``mmcv._ext`` for ``sys.meta_path``."""

    serves = 'mmcv._ext'

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the spec of the package ops/, which imports nothing else from this package."""
        if name == cls.serves:
            from importlib.util import spec_from_file_location

            ops = os.path.join(os.path.dirname(__file__), 'ops')
            return spec_from_file_location(name, os.path.join(ops, '__init__.py'), submodule_search_locations=[ops])
        return None


def provide_operators() -> None:
    """Add the finder to ``sys.meta_path``, once."""
    if not any(getattr(finder, 'serves', None) == OperatorFinder.serves for finder in sys.meta_path):
        sys.meta_path.append(OperatorFinder)


def is_command() -> bool:
    """Return whether this process is ``spec-mmdet`` or ``python -m spec_mmdet``."""
    module = [*sys.orig_argv, ''][sys.orig_argv.index('-m') + 1] if '-m' in sys.orig_argv else ''
    return module == 'spec_mmdet' or os.path.splitext(os.path.basename(sys.argv[0]))[0] == 'spec-mmdet'
