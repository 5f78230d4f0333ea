"""Merge --cfg-options into a config; a setting without effect is an error that suggests the correct one."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from traceback import extract_tb

import mmcv.ops.nms
import mmdet.registry
from mmcv.transforms import BaseTransform
from mmdet.registry import OPTIMIZERS
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..compat import get_content
from ..configs import walk
from ..errors import InputError, list_briefly
from ..models.connecting import connect_backbone
from ..processes import tell

# Top-level names that MMEngine's runner and the commands read; others are helper variables of the config file.
TOP = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg', 'launcher'}
TOP |= {'activation_checkpointing', 'compile', 'custom_imports', 'default_scope', 'efficient_conv_bn_eval'}
TOP |= {'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline'}
# Keys that are read in dicts without a type; in dicts with a type, they are the arguments of its class.
LOADER = {*inspect.signature(DataLoader.__init__).parameters} - {'self'} | {'num_batch_per_epoch'}
UNTYPED = {
    **{f'{loop}_dataloader': LOADER for loop in ('train', 'val', 'test')},
    'auto_scale_lr': {'enable', 'base_batch_size'},
    'env_cfg': {'cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'},
    'filter_cfg': {'filter_empty_gt', 'min_size'},
    'metainfo': {'classes', 'palette'},
    'paramwise_cfg': {
        *('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult'),
        *('flat_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate', 'layer_decay'),
        *('decay_rate', 'decay_type', 'num_layers'),  # MMDetection's constructor for ConvNeXt
    },
    'randomness': {*inspect.signature(Runner.set_randomness).parameters} - {'self'},
}
# Keys that the builders accept in addition to the arguments of a class.
OF_BUILDERS = {'type', '_scope_', '_delete_', 'init_cfg', 'priority', 'constructor', 'paramwise_cfg', 'optimizer'}
OF_BUILDERS |= {'convert_to_iter_based', 'data_preprocessor', 'num_batch_per_epoch'}
INSTEAD = dict(max_epochs='--epochs', image_size='--image-size', scale='--image-size', scales='--image-size')
INSTEAD |= dict(data_root='--data', launcher='--launcher', epochs='--epochs', lr='--lr', batch_size='--batch-size')
INSTEAD |= dict(seed='randomness.seed')


def merge(cfg: Config, options: dict[str, object] | None) -> None:
    """Merge --cfg-options into a config; changes ``cfg``.

    Raises:
        InputError: naming the first key without effect or place in the config.
    """
    options = options or {}
    for key in options:
        check_key(cfg, key, options)
        remove_none_parents(cfg, key)
    before = dict(walk(copy.deepcopy(get_content(cfg))))
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f'--cfg-options: {error}') from error
    for name, node in walk(get_content(cfg)):
        if f'{name}.type' in options and (known := find_arguments(node['type'])) is not None:
            stale = [key for key in node if key in before.get(name, ()) and key not in known]
            for key in [key for key in stale if f'{name}.{key}' not in options]:
                print(f'{name}.{key}: removed, because {node["type"]} has no such argument', file=sys.stderr)
                del node[key]


def remove_none_parents(cfg: Config, key: str) -> None:
    """Remove None from a config where a key of --cfg-options needs a dict; changes ``cfg``."""
    node = get_content(cfg)
    for part in key.split('.')[:-1]:
        if isinstance(node, (list, tuple)):
            node = node[int(part)]
        elif isinstance(node, dict) and node.get(part) is not None:
            node = node[part]
        else:
            if isinstance(node, dict):
                node.pop(part, None)
            return


def adjust_dependent_settings(cfg: Config) -> None:
    """Adjust dependent settings (maps of the backbone, persistent workers) and report each change; changes ``cfg``.

    Raises:
        InputError: if the seed or the interval of evaluations is invalid.
    """
    seed = (cfg.get('randomness') or {}).get('seed')
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**32):
        raise InputError(f'randomness.seed in the config is {seed!r}. Use an integer from 0 to 2^32 - 1')
    interval = (cfg.get('train_cfg') or {}).get('val_interval', 1)
    if not (type(interval) is int and interval > 0):
        raise InputError(f'train_cfg.val_interval in the config is {interval!r}. Use an integer from 1 on')
    for loop in ('train', 'val', 'test'):
        loader = cfg.get(f'{loop}_dataloader') or {}
        if not loader.get('num_workers', 0) and loader.pop('persistent_workers', False):
            tell(f'{loop}_dataloader.persistent_workers: removed, because num_workers is 0')
        if not loader.get('num_workers', 0):
            loader.pop('prefetch_factor', None)
    if changes := connect_backbone(cfg.get('model') or {}):
        tell(f'set to fit SpecXCiT: {", ".join(changes)}')


def require_complete_loops(cfg: Config, needed: str) -> None:
    """Check that the settings of each loop are all there or all missing, and remove others that are None.

    Args:
        cfg: the complete config.
        needed: the loop that must be there, 'train' or 'test'.

    Raises:
        InputError: naming those of a loop that are missing.
    """
    for names in (
        ('train_dataloader', 'train_cfg', 'optim_wrapper'),
        ('val_dataloader', 'val_cfg', 'val_evaluator'),
        ('test_dataloader', 'test_cfg', 'test_evaluator'),
    ):
        missing = [name for name in names if cfg.get(name) is None]
        if missing and (len(missing) < len(names) or names[0].startswith(needed)):
            raise InputError(f'{" and ".join(missing)} of the config is None or missing. Set all of {", ".join(names)}')
    for name in ('env_cfg', 'randomness'):
        if cfg.get(name, {}) is None:
            cfg.pop(name)


def check_key(cfg: Config, key: str, options: dict[str, object]) -> None:
    """Check that a key of --cfg-options has an effect.

    Raises:
        InputError: if not.
    """
    node, above = get_content(cfg), []
    for part in key.split('.'):
        here = '.'.join(above)
        name = f'{here}.{part}' if here else part
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(f'--cfg-options {key}: {here} is a list of {len(node)}. Use {here}.0, {here}.1, ...')
            node = node[int(part)]
        elif isinstance(node, dict):
            known = find_readable_keys(cfg, above, node, options)
            if known is not None and part not in known and (part not in node or not above):
                raise InputError(f'--cfg-options {key}: {describe_unread_key(cfg, part, here, known)}')
            if part not in node and (name in UNTYPED or part in UNTYPED):
                node = {part: {}}
            if part not in node:
                return  # a new dict, whose keys its class checks
            node = node[part]
        else:
            if node is None or options.get(f'{here}._delete_'):  # replaced by a new dict
                return
            hint = f'. Add {here}._delete_=True to replace it by a dict'
            raise InputError(f'--cfg-options {key}: {here} is {node!r:.60} in the config, not a dict{hint}')
        above.append(part)


def find_readable_keys(cfg: Config, above: list[str], node: dict, options: dict[str, object]) -> set[str] | None:
    """Return the keys that are read in a dict of a config; None if any key may be."""
    here = '.'.join(above)
    if not above:
        return TOP
    kind = options.get(f'{here}.type', node.get('type'))
    if kind is not None:
        return find_arguments(kind)
    names = UNTYPED.get(here, UNTYPED.get(above[-1]))
    if names is not None:
        return names | OF_BUILDERS
    if above[0] == 'model' and above[1:2] in (['train_cfg'], ['test_cfg']):
        return {*node, *collect_model_words(cfg)}
    new = {key.removeprefix(f'{here}.').split('.')[0] for key in options if key.endswith('.type')}
    unlike = {key.removeprefix(f'{here}.').split('.')[0] for key in options if key.startswith(f'{here}.')}
    return {*node, *new, *(name for name in unlike if not get_close_matches(name, node, cutoff=0.75))}


@cache  # a registry searches Python's modules for each name that it does not have
def find_classes(kind: object) -> list[type]:
    """List the classes and functions of a type in a config, from MMDetection's and MMSegmentation's registries."""
    if not isinstance(kind, str):
        return [kind]
    places = [*vars(mmdet.registry).values(), *vars(sys.modules.get('mmseg.registry', mmdet.registry)).values()]
    registries = [registry for registry in places if isinstance(registry, Registry)]
    return [found for registry in registries if (found := registry.get(kind)) is not None]


def find_arguments(kind: object) -> set[str] | None:
    """Return the arguments of a type in a config; None if they are unknown or arbitrary."""
    names: set[str] = set()
    for found in find_classes(kind):
        for cls in inspect.getmro(found) if inspect.isclass(found) else [found]:
            made_by = cls.__dict__.get('__init__') if inspect.isclass(cls) else cls
            if made_by is None:
                continue
            parameters = inspect.signature(made_by).parameters
            names |= {*parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break  # passes nothing to its base classes
        else:
            return None
    return names - {'self', 'args', 'kwargs'} | OF_BUILDERS if names else None


def collect_model_words(cfg: Config) -> set[str]:
    """Return all words in the source code of a model's parts, which receive train_cfg and test_cfg."""
    modules = {mmcv.ops.nms}
    for _, node in walk(cfg.model):
        for found in find_classes(node.get('type')) if 'type' in node else ():
            modules |= {inspect.getmodule(cls) for cls in inspect.getmro(found)} if inspect.isclass(found) else set()
    sources = (inspect.getsource(module) for module in modules if module and module.__name__ != 'builtins')
    return {word for source in sources for word in re.findall(r'\w+', source)}


def describe_unread_key(cfg: Config, part: str, here: str, known: set[str]) -> str:
    """Describe a key without effect, and suggest the correct one."""
    where = here or 'the config'
    if not here and part not in cfg and part in INSTEAD:
        return f'use {INSTEAD[part]} instead'
    if not here and part in cfg:
        value = cfg[part] if isinstance(cfg[part], (dict, list)) else None
        read = ((name, node) for name, node in walk({**cfg}) if name.split('.')[0] in TOP)
        places = [INSTEAD[part]] if part in INSTEAD else []
        places += [
            f'{name}.{key}' for name, node in read for key in node if key == part or value and node[key] == value
        ]
        meant = f' Set {" or ".join(places[:3])} instead' if places else ''
        return f'is only a helper variable of the config file, so changing it has no effect.{meant}'
    near = get_close_matches(part, known, 1, cutoff=0.6) or get_close_matches(part, [*walk_keys(cfg)], 1, cutoff=0.9)
    if near and near[0] in known:
        meant = f'did you mean {here + "." if here else ""}{near[0]}?'
    else:
        places = [name for name in walk_names(cfg) if name.split('.')[-1] == (near or [part])[0]]
        names = list_briefly(sorted(known - OF_BUILDERS)) if len(known) < 100 else ''
        meant = f'did you mean {places[0]}?' if places else f'it has {names}' if names else 'leave it out'
    return f'nothing reads {part} in {where}; {meant}'


def walk_names(cfg: Config) -> list[str]:
    """List the names of all settings in a config."""
    return [f'{name}.{key}' if name else key for name, node in walk({**cfg}) for key in node]


def walk_keys(cfg: Config) -> set[str]:
    return {name.split('.')[-1] for name in walk_names(cfg)}


def explain_config_error(error: BaseException) -> str | None:
    """Describe the fault of a config that caused an exception; None if the config is not the cause.

    The config is the cause if the exception was raised in MMEngine's build_from_cfg, the runner's builders, or a
    transform. However, an exception of this package's own code, other than a ValueError, is a bug.
    """
    if isinstance(error, ImportError) and not (error.name or '').startswith('spec_mmdet'):
        return to_one_line(error)
    frames, last, transform = [], None, ''
    traceback = error.__traceback__
    while traceback:
        last = traceback.tb_frame
        module = last.f_globals.get('__name__', '')
        if last.f_code.co_name.startswith('build') and module.startswith(('mmengine.registry', 'mmengine.runner')):
            frames.append(last)
        if isinstance(last.f_locals.get('self'), BaseTransform):
            transform = type(last.f_locals['self']).__name__
        traceback = traceback.tb_next
    own = last is not None and last.f_globals.get('__name__', '').startswith('spec_mmdet.')
    message = to_one_line(error)
    if 'in DataLoader worker process' in message:  # with the worker's traceback
        file = re.findall('File "(.*?)"', message)[-1]
        own, transform = '/spec_mmdet/' in file, ''.join(re.findall(r'transforms/(\w+)', message)[-1:])
        message = str(error).strip().splitlines()[-1]
    if own and not isinstance(error, ValueError):
        return None
    if transform and not frames:
        return f'config: a transform ({transform}) failed: {type(error).__name__}: {message}'
    if not frames:
        return None
    kind = next(
        (f.f_locals['cfg'].get('type') for f in reversed(frames) if isinstance(f.f_locals.get('cfg'), dict)), ''
    )
    kind = getattr(kind, '__name__', kind) or frames[-1].f_code.co_name.removeprefix('build_')
    near: Sequence[str] = ()
    if isinstance(error, KeyError) and (registry := frames[-1].f_locals.get('registry')):
        near = get_close_matches(str(kind), [*registry.module_dict, *(registry.parent or registry).module_dict], 1)
        if ' is not in the ' in str(error):
            return f'config: {kind} is not in the {registry.name} registry{suggest(near)}'
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        near = get_close_matches(unknown[1], find_arguments(kind) or (), 1)
    if 'None is not a callable' in str(error):  # MMEngine does not check that an optimiser exists
        kind = (frames[-1].f_locals.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
        names = sorted(OPTIMIZERS.module_dict.keys() | OPTIMIZERS.parent.module_dict.keys())
        near = get_close_matches(str(kind), names, 3, 0)
        advice = 'Run: pip install lion-pytorch' if kind == 'Lion' else f'Use {" or ".join(near)}'
        return f'config: there is no optimiser {kind}. {advice}'
    name = '' if isinstance(error, (ValueError, AssertionError)) and message else f'{type(error).__name__}: '
    message = message or extract_tb(error.__traceback__)[-1].line  # of an assertion without a message
    return f'config: {kind} cannot be built: {name}{message}{suggest(near)}'


def suggest(near: Sequence[str]) -> str:
    return f'; did you mean {near[0]}?' if near else ''


def to_one_line(error: BaseException) -> str:
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    return text.replace('pip install sklearn', 'pip install scikit-learn')  # MMDetection's PAA names another package
