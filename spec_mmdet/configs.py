"""Find configs: shipped ones by name, and a training's in its work directory.

A config inherits a shipped one by ``_base_ = 'spec_mmdet::xcit/NAME.py'``; our commands need no folder before NAME.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module, util
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

from .compat import accept_bases_without_folder, cache_packages
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
    hint = f'; did you mean {near[0]}?' if near else f'. Pass a path or one of: {", ".join(names)}'
    raise InputError(f'config {name}: no such file or shipped config{hint}')


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

    Raises:
        InputError: if the file, or one that it inherits, is invalid.
    """
    try:
        with accept_bases_without_folder(CONFIGS.name), cache_packages():
            cfg = Config.fromfile(path)
        if is_segmentor(cfg):
            import_module('mmseg.registry')
    except Exception as error:  # the file is Python
        first = str(error).strip().partition('\n')[0]
        if 'Duplicate key' in first:
            first += (
                '. Keep one of these bases. Configs of MMDetection need no spec_mmdet::_base_/runtime.py, because the '
                'commands add its hooks'
            )
        if isinstance(error, ImportError) and 'mmseg' in first:
            first += '. Run: pip install spec_mmdet[seg]'
        raise InputError(f'config {path}: {type(error).__name__}: {first}') from error
    if is_segmentor(cfg):  # the part of a config that is MMSegmentation's is found by its scope
        for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if dataset := (cfg.get(name) or {}).get('dataset'):
                dataset.setdefault('_scope_', 'mmseg')
    object.__setattr__(cfg, '__class__', CachedTextConfig)  # Config's own would add a key
    return cfg


def is_segmentor(cfg: Config) -> bool:
    """Return whether a config's model is MMSegmentation's."""
    return cfg.get('default_scope') == 'mmseg'


def walk(node: object, name: str = '') -> Iterator[tuple[str, dict]]:
    """Yield every dict in (a part of) a config with its name for --cfg-options, outer dicts first."""
    if isinstance(node, dict):
        yield name, node
        for key, child in node.items():
            yield from walk(child, f'{name}.{key}' if name else str(key))
    elif isinstance(node, (list, tuple)):
        for i, child in enumerate(node):
            yield from walk(child, f'{name}.{i}' if name else str(i))


def find_class(node: dict, registry: Registry) -> type | None:
    """Return the class of a config's ``type``, which may be a name (with or without scope) or a class; or None.

    The name is MMDetection's or, in a dict of the scope ``mmseg``, MMSegmentation's.
    """
    kind = node.get('type')
    if isinstance(kind, str):
        owner = registry
        if 'mmseg' in (node.get('_scope_'), kind.partition('.')[0]) and util.find_spec('mmseg'):
            import_module('mmseg.registry')
            owner, kind = (registry.parent or registry).children['mmseg'], kind.removeprefix('mmseg.')
            owner.import_from_location()
        while owner is not None and kind not in owner.module_dict:
            owner = owner.parent
        # Registry.get is not called with an unknown name, because MMEngine would import a module of that name.
        kind = owner.module_dict[kind] if owner else registry.get(kind) if kind.startswith('mmdet.') else None
    return kind if inspect.isclass(kind) else None


def is_kind_of(node: dict, registry: Registry, kinds: type | tuple[type, ...]) -> bool:
    """Return whether the type of a config's dict is one of these classes or a subclass."""
    return issubclass(find_class(node, registry) or object, kinds)
