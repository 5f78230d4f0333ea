"""Substitute this package's types for MMDetection's and MMEngine's in a config, and add the hooks that guard a run.

The commands train, test and predict call these functions once, when they have loaded a config.
"""

from __future__ import annotations

from collections.abc import Iterator

import mmdet.registry
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from .configs import find_class, is_kind_of, walk
from .data.tasks import find_task
from .errors import InputError
from .models.xcit import SpecXCiT

# Registry, name there, and our type: a subclass, which accepts the same arguments.
TABLE = (
    ('DATASETS', 'CocoDataset', 'CheckedCocoDataset'),
    ('DATASETS', 'CocoPanopticDataset', 'CheckedCocoPanopticDataset'),
    ('METRICS', 'CocoMetric', 'FastCocoMetric'),
    ('METRICS', 'CocoPanopticMetric', 'PanopticQuality'),
    ('TRANSFORMS', 'LoadImageFromFile', 'CheckedLoadImageFromFile'),
    ('TRANSFORMS', 'LoadAnnotations', 'CheckedLoadAnnotations'),
    ('TRANSFORMS', 'LoadPanopticAnnotations', 'CheckedLoadPanopticAnnotations'),
    ('LOOPS', 'EpochBasedTrainLoop', 'ExactEpochTrainLoop'),
    ('LOOPS', 'IterBasedTrainLoop', 'ExactIterTrainLoop'),
    ('HOOKS', 'CheckpointHook', 'AtomicCheckpointHook'),
    ('VISUALIZERS', 'DetLocalVisualizer', 'LabelVisualizer'),
)

# In these pipelines, MMDetection's DetInferencer looks for LoadImageFromFile by name.
INFERENCE = ('test_dataloader', 'test_pipeline', 'tta_pipeline')
LOADING = ('LoadImageFromFile', 'LoadAnnotations')

# Entries of default_hooks; None there turns one off.
GUARDS = dict(
    checkpoint_guard='CheckpointGuard',
    schedule_guard='ScheduleGuard',
    finite_guard='FiniteGuard',
    loader_guard='LoaderGuard',
    buffer_guard='BufferGuard',
    history='HistoryLimit',
)


def list_registries() -> Iterator[Registry]:
    """Yield MMDetection's registries, with all of their modules imported."""
    for registry in vars(mmdet.registry).values():
        if isinstance(registry, Registry):
            registry.import_from_location()
            yield registry


def name_types(cfg: Config) -> None:
    """Replace classes (new-style configs) and names with the scope "mmdet" by registered names; changes ``cfg``.

    A class that is not registered stays.
    """
    names = {}
    for registry in list_registries():
        while registry is not None:
            names |= {found: name for name, found in registry.module_dict.items() if found not in names}
            registry = registry.parent
    for _, node in walk({**cfg}):
        kind = node.get('type')
        if isinstance(kind, str) and kind.count('.') > 1:  # from a dumped new-style config
            kind = get_object_from_string(kind)
        if not isinstance(kind, str) and kind in names:
            node['type'] = names[kind]
            cfg.default_scope = cfg.get('default_scope') or 'mmdet'
        elif isinstance(kind, str) and cfg.get('default_scope') == 'mmdet':
            node['type'] = kind.removeprefix('mmdet.')


def add_scope(cfg: Config, name: str) -> str:
    """Return the name by which a config finds one of our types: with MMDetection's scope, if that is not its own."""
    return name if cfg.get('default_scope') == 'mmdet' else f'mmdet.{name}'


def substitute_types(cfg: Config, testing: bool = False) -> list[str]:
    """Substitute this package's types for those of :data:`TABLE` in a config; changes ``cfg``.

    Only a type that resolves to exactly the class in the table is substituted; a subclass stays.

    Args:
        cfg: the complete config, in MMEngine's old or new style.
        testing: whether to also substitute the loading transforms in the test pipeline, where DetInferencer needs them.

    Returns:
        The substitutions, for instance "CocoDataset -> CheckedCocoDataset".
    """
    name_types(cfg)
    rows = {}
    for registry, name, ours in TABLE:
        registry = getattr(mmdet.registry, registry)
        theirs = next(base for base in registry.get(ours).__mro__[1:] if base.__name__ == name)
        rows[name] = registry, theirs, add_scope(cfg, ours)
    done = {}
    loop = cfg.get('train_cfg') or {}
    if loop and 'type' not in loop:
        loop['type'] = 'EpochBasedTrainLoop' if loop.pop('by_epoch') else 'IterBasedTrainLoop'
    for place, node in walk({**cfg}):
        kind = node.get('type')
        name = kind.rpartition('.')[2] if isinstance(kind, str) else ''
        if name not in rows or name in LOADING and not testing and place.split('.')[0] in INFERENCE:
            continue
        registry, theirs, ours = rows[name]
        if find_class({'_scope_': cfg.get('default_scope'), **node}, registry) is theirs:
            node['type'] = ours
            done[f'{name} -> {ours}'] = None
    return list(done)


def add_guards(cfg: Config, keep_types: bool = False) -> list[str]:
    """Add the hooks of :data:`GUARDS` that a config lacks to its default_hooks; changes ``cfg``.

    Unless ``keep_types``, a config without a checkpoint hook gets ours.

    Returns:
        Names of the added hooks, and of those that ``default_hooks.NAME=None`` turns off.
    """
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    custom = cfg.get('custom_hooks') or []
    if not isinstance(custom, list) or not all(isinstance(hook, dict) for hook in custom):
        raise InputError(f'config: custom_hooks must be a list of dicts, not {custom!r:.60}')
    present = {hook.get('type') for hook in [*hooks.values(), *custom] if hook}
    done = []
    for name, kind in GUARDS.items():
        if name in hooks and hooks[name] is None:
            done.append(f'{name} (turned off)')
        elif name not in hooks and kind not in present:
            hooks[name] = dict(type=add_scope(cfg, kind))
            done.append(name)
    if 'checkpoint' not in hooks and not keep_types:
        hooks.checkpoint = dict(type='AtomicCheckpointHook', interval=1)
    return done


def add_records(cfg: Config) -> list[str]:
    """Add what our configs record to one of MMDetection's; changes ``cfg``.

    These are the results and the best checkpoint, if the config evaluates the metrics of a known task during training,
    and the condition numbers of a SpecXCiT.

    Returns:
        Names of the added hooks and setting.
    """
    best, hooks, done = find_task(cfg).find_best_metric(cfg), cfg.default_hooks, []
    if best is not None and 'results' not in hooks:
        hooks['results'] = dict(type=add_scope(cfg, 'ResultsHook'))
        done.append('results')
    backbone = (cfg.get('model') or {}).get('backbone') or {}
    if 'conditioning' not in hooks and is_kind_of(backbone, mmdet.registry.MODELS, SpecXCiT):
        hooks['conditioning'] = dict(type=add_scope(cfg, 'ConditioningHook'))
        done.append('conditioning')
    if best and hooks.get('checkpoint') and 'save_best' not in hooks.checkpoint:
        hooks.checkpoint.save_best, hooks.checkpoint.rule = best, 'greater'
        done.append(f'checkpoint.save_best={best}')
    return done


def add_import(cfg: Config) -> None:
    """Make a config import this package when it is read, as MMDetection's own tools need; changes ``cfg``."""
    settings = cfg.get('custom_imports') or {}
    names = settings.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if __package__ not in names:
        cfg.custom_imports = dict(settings, imports=[*names, __package__])


def protect(cfg: Config, keep_types: bool = False, testing: bool = False, running: bool = True) -> None:
    """Substitute types, add guards, and print the changes in one line; changes ``cfg``.

    Args:
        keep_types: whether to only replace classes by their names.
        testing: see :func:`substitute_types`.
        running: whether the config is for a runner, which needs the guards.
    """
    if keep_types:
        name_types(cfg)
    types = [] if keep_types else substitute_types(cfg, testing)
    if running:
        add_import(cfg)
    guards = add_guards(cfg, keep_types) if running else []
    guards += add_records(cfg) if running and not testing and not keep_types else []
    parts = [f'types substituted: {", ".join(types)} (--keep-types keeps them)'] if types else []
    parts += [f'hooks added: {", ".join(guards)} (default_hooks.NAME=None turns one off)'] if guards else []
    if parts and is_main_process():
        print(f'config: {"; ".join(parts)}')
