"""Where configs are: those that this package ships, by name on the command line and as ``spec_mmdet::NAME.py`` in a
config's _base_, and that of a training, in its work directory.
"""

from __future__ import annotations

from pathlib import Path

import mmdet
from mmengine.config import Config

from .errors import InputError

CONFIGS = Path(__file__).parent / '.mim' / 'configs'  # MMEngine's convention; in the repository, a link to configs/
CONFIGS_OF_MMDET = Path(mmdet.__file__).parent / '.mim' / 'configs'


def find_config(name: str) -> Path:
    """The file of a config that is named by its path or, if it is one of those shipped, by its name.

    Raises:
        InputError: if there is no such file.
    """
    shipped = CONFIGS / f'{name.removeprefix("spec_mmdet::").removesuffix(".py")}.py'
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = ', '.join(sorted(path.stem for path in CONFIGS.glob('*.py')))
    raise InputError(f'config {name}: no such file, nor the name of one that spec_mmdet ships ({names})')


def find_run_config(work_dir: Path) -> Path:
    """The config that a training wrote into its work directory.

    Raises:
        InputError: if there is none, or there are several.
    """
    found = sorted(work_dir.glob('*.py'))
    if len(found) != 1:
        raise InputError(f'{work_dir}: has {len(found)} configs (*.py), and one is wanted, as a training leaves it')
    return found[0]


def _get_cfg_path(cfg_path: str, filename: str, of_mmengine=Config._get_cfg_path) -> tuple[str, str | None]:
    package, _, name = cfg_path.partition('::')
    if package == 'spec_mmdet':
        return str(CONFIGS / name), None
    if package == 'mmdet' and (path := CONFIGS_OF_MMDET / name).is_file():
        return str(path), package
    return of_mmengine(cfg_path, filename)


# MMEngine resolves the names of OpenMMLab's own projects alone, from a list in its code, and reads each time all that
# MMDetection tells of its models for a path that is the name itself.
Config._get_cfg_path = staticmethod(_get_cfg_path)

_formatted: dict[str, str] = {}


def _pretty_text(config: Config, of_mmengine=Config.pretty_text.fget) -> str:
    content = repr(config)
    if content not in _formatted:
        _formatted.clear()
        _formatted[content] = of_mmengine(config)
    return _formatted[content]


# MMEngine has yapf format the same config for the log, the work directory, TensorBoard and every checkpoint: once is
# enough.
Config.pretty_text = property(_pretty_text)
