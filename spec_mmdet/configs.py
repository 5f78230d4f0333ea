"""Find configs: shipped ones by name, and a training's in its work directory.

A config inherits a shipped one by ``_base_ = 'spec_mmdet::xcit/NAME.py'``.
"""

from __future__ import annotations

import ast
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from .compat import set_filename
from .errors import InputError

# MMEngine's convention is PACKAGE/.mim/configs/FOLDER/NAME.py; in the repository, this is a link to configs/.
CONFIGS = Path(__file__).parent / '.mim' / 'configs' / 'xcit'

# MMEngine finds PACKAGE::FOLDER/NAME.py by this table, next to a distribution or a module. An editable install is not
# next to its distribution, so this names a module.
MODULE2PACKAGE['spec_mmdet'] = __name__


class CachedTextConfig(Config):
    """Config that caches its formatted text until it changes.

    MMEngine formats it for the log, the work directory, TensorBoard and every checkpoint, which takes seconds each.
    """

    @property
    def pretty_text(self) -> str:
        """The config as Python text."""
        content = repr(self)
        cached = self.__dict__.get('_cached_text')
        if cached is None or cached[0] != content:
            cached = self.__dict__['_cached_text'] = content, super().pretty_text
        return cached[1]


def find_config(name: str) -> Path:
    """Return the file of a config, given its path or the name of a shipped one.

    Raises:
        InputError: if there is no such file.
    """
    shipped = CONFIGS / f'{name.removeprefix("spec_mmdet::").removeprefix("xcit/").removesuffix(".py")}.py'
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = sorted(path.stem for path in CONFIGS.glob('*.py'))
    near = get_close_matches(shipped.stem, names, 1)
    hint = f'did you mean {near[0]}?' if near else f'Pass a path or one of: {", ".join(names)}'
    raise InputError(f'config {name}: no such file or shipped config; {hint}')


def find_run_config(work_dir: Path) -> Path:
    """Return the config that a training wrote to its work directory.

    Raises:
        InputError: unless there is exactly one.
    """
    found = sorted(work_dir.glob('*.py'))
    if len(found) != 1:
        raise InputError(f"{work_dir}: contains {len(found)} configs (*.py) instead of the training's one")
    return found[0]


def read_config(path: Path) -> Config:
    """Read a config file as a :class:`CachedTextConfig`.

    Entries of ``_base_`` may be ``spec_mmdet::NAME.py``, without the subfolder that MMEngine demands before NAME.
    """
    with TemporaryDirectory() as folder:
        cfg = Config.fromfile(add_folders(path, Path(folder)))
    set_filename(cfg, path)
    object.__setattr__(cfg, '__class__', CachedTextConfig)  # Config's own would add a key
    return cfg


def add_folders(path: Path, folder: Path) -> Path:
    """Return a config file whose bases have the folder that MMEngine demands, ``spec_mmdet::xcit/NAME.py``.

    Args:
        path: a config file.
        folder: for a copy of the file, and of those that it inherits, where a base lacks the folder. MMEngine resolves
            bases in a function that cannot be extended, so the file itself must name them in its form.

    Returns:
        The file itself if nothing lacks a folder.
    """
    try:
        text = path.read_text(encoding='utf-8')
        statement = next(s for s in ast.parse(text).body if isinstance(s, ast.Assign) and s.targets[0].id == '_base_')
        bases = ast.literal_eval(statement.value)
    except (OSError, SyntaxError, ValueError, AttributeError, StopIteration):
        return path  # no Python, no bases or a fault that MMEngine explains
    named = [bases] if isinstance(bases, str) else list(bases)
    found, changed = [], False
    for base in named:
        scope, _, name = base.rpartition('::')
        if scope == 'spec_mmdet' and '/' not in name:
            base, changed = f'{scope}::xcit/{name}', True
        elif not scope:
            own = path.parent / base
            copied = add_folders(own, folder)
            base, changed = str(copied.resolve()), changed or copied != own
        found.append(base)
    if not changed:
        return path
    lines = text.splitlines(keepends=True)
    lines[statement.lineno - 1 : statement.end_lineno] = [f'_base_ = {found!r}\n']
    copy = folder / str(len(list(folder.iterdir()))) / path.name
    copy.parent.mkdir()
    copy.write_text(''.join(lines), encoding='utf-8')
    return copy
