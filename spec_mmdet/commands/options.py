"""--cfg-options: each setting has an effect, or is refused with what to write in its place."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

import mmcv.ops.nms
import mmdet.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..compat import get_content
from ..data.fitting import walk
from ..errors import InputError, list_briefly
from ..models.xcit import ARCHS

# What MMEngine's runner and the commands read of a config; every other name in it is one that its own lines use.
TOP = {*inspect.signature(Runner.__init__).parameters} - {'self', 'cfg', 'launcher'}
TOP |= {'activation_checkpointing', 'compile', 'custom_imports', 'default_scope', 'efficient_conv_bn_eval'}
TOP |= {'find_unused_parameters', 'model_wrapper_cfg', 'runner_type', 'sync_bn', 'tta_model', 'tta_pipeline'}
# Of dicts without a type, what is read; of those with one, it is the arguments of its class.
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
# What the builders take beside a class's own arguments.
OF_BUILDERS = {'type', '_scope_', '_delete_', 'init_cfg', 'priority', 'constructor', 'paramwise_cfg', 'optimizer'}
OF_BUILDERS |= {'convert_to_iter_based', 'data_preprocessor', 'num_batch_per_epoch'}
INSTEAD = dict(max_epochs='--epochs', image_size='--image-size', scale='--image-size', scales='--image-size')
INSTEAD |= dict(data_root='--data', launcher='--launcher', epochs='--epochs', lr='--lr', batch_size='--batch-size')
INSTEAD |= dict(seed='randomness.seed')


def merge(cfg: Config, options: dict[str, object] | None) -> None:
    """Merge --cfg-options into a config; changes ``cfg``.

    Raises:
        InputError: at the first key that nothing would read, or that is no place in the config.
    """
    options = options or {}
    for key in options:
        check_key(cfg, key, options)
        remove_none_parents(cfg, key)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f'--cfg-options: {error}') from error


def remove_none_parents(cfg: Config, key: str) -> None:
    """Take away what is None in a config where a key of --cfg-options has a dict; changes ``cfg``."""
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
    """Have a config's settings follow from those that they depend on, saying so; changes ``cfg``."""
    for loop in ('train', 'val', 'test'):
        loader = cfg.get(f'{loop}_dataloader') or {}
        if not loader.get('num_workers', 0) and loader.pop('persistent_workers', False):
            print(f'{loop}_dataloader: there is no worker to be persistent', file=sys.stderr)
        if not loader.get('num_workers', 0):
            loader.pop('prefetch_factor', None)
    model = cfg.get('model') or {}
    backbone, neck = model.get('backbone') or {}, model.get('neck') or {}
    arch = backbone.get('arch', 'small_12')
    arch = ARCHS.get(arch, {}) if isinstance(arch, str) else arch
    if backbone.get('type') == 'SpecXCiT' and neck.get('type') == 'FPN' and arch.get('dim'):
        channels = [arch['dim']] * len(neck['in_channels'])
        if list(neck['in_channels']) != channels:
            print(f"model.neck.in_channels: {channels}, the backbone's", file=sys.stderr)
            neck['in_channels'] = channels


def check_key(cfg: Config, key: str, options: dict[str, object]) -> None:
    """Check that a key of --cfg-options names a setting that is read.

    Raises:
        InputError: if not.
    """
    node, above = get_content(cfg), []
    for part in key.split('.'):
        here = '.'.join(above)
        name = f'{here}.{part}' if here else part
        if isinstance(node, (list, tuple)):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(
                    f'--cfg-options {key}: {here} is a list of {len(node)}; its entries are {here}.0, {here}.1, ...'
                )
            node = node[int(part)]
        elif isinstance(node, dict):
            known = find_readable_keys(cfg, above, node, options)
            if known is not None and part not in known and (part not in node or not above):
                raise InputError(f'--cfg-options {key}: {describe_unread_key(cfg, part, here, known)}')
            if part not in node and (name in UNTYPED or part in UNTYPED):
                node = {part: {}}
            if part not in node:
                return  # what is below it is new, and for the class that it is given to
            node = node[part]
        else:
            if node is None or options.get(f'{here}._delete_'):  # a new dict takes its place
                return
            hint = f'; to make it a dict, add {here}._delete_=True'
            raise InputError(f'--cfg-options {key}: {here} is {node!r:.60} in the config, not a dict{hint}')
        above.append(part)


def find_readable_keys(cfg: Config, above: list[str], node: dict, options: dict[str, object]) -> set[str] | None:
    """What is read of a dict in a config, by name; None where anything may be."""
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


def find_classes(kind: object) -> Iterator[type]:
    """The classes, or functions, that a type in a config may mean, in any of MMDetection's registries."""
    if not isinstance(kind, str):
        yield kind
        return
    for registry in vars(mmdet.registry).values():
        if isinstance(registry, Registry) and (found := registry.get(kind)) is not None:
            yield found


def find_arguments(kind: object) -> set[str] | None:
    """The arguments that a type in a config takes; None where that is not known, or it takes any."""
    names: set[str] = set()
    for found in find_classes(kind):
        for cls in inspect.getmro(found) if inspect.isclass(found) else [found]:
            made_by = cls.__dict__.get('__init__') if inspect.isclass(cls) else cls
            if made_by is None:
                continue
            parameters = inspect.signature(made_by).parameters
            names |= {*parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                break  # nothing is handed on to the classes that it inherits from
        else:
            return None
    return names - {'self', 'args', 'kwargs'} | OF_BUILDERS if names else None


def collect_model_words(cfg: Config) -> set[str]:
    """Every word in the sources of a model's parts, to which train_cfg and test_cfg are handed through."""
    modules = {mmcv.ops.nms}
    for _, node in walk(cfg.model):
        for found in find_classes(node.get('type')) if 'type' in node else ():
            modules |= {inspect.getmodule(cls) for cls in inspect.getmro(found)} if inspect.isclass(found) else set()
    sources = (inspect.getsource(module) for module in modules if module and module.__name__ != 'builtins')
    return {word for source in sources for word in re.findall(r'\w+', source)}


def describe_unread_key(cfg: Config, part: str, here: str, known: set[str]) -> str:
    """What is wrong with a key that nothing reads, and what may be meant."""
    where = here or 'the config'
    if not here and part not in cfg and part in INSTEAD:
        return f'say {INSTEAD[part]}'
    if not here and part in cfg:
        value = cfg[part] if isinstance(cfg[part], (dict, list)) else None
        read = ((name, node) for name, node in walk({**cfg}) if name.split('.')[0] in TOP)
        places = [INSTEAD[part]] if part in INSTEAD else []
        places += [
            f'{name}.{key}' for name, node in read for key in node if key == part or value and node[key] == value
        ]
        meant = f'; say {" or ".join(places[:3])}' if places else ''
        return f'nothing reads it, it is a name that the lines of the config use{meant}'
    near = get_close_matches(part, known, 1, cutoff=0.6) or get_close_matches(part, [*walk_keys(cfg)], 1, cutoff=0.9)
    if near and near[0] in known:
        meant = f'is {here + "." if here else ""}{near[0]} meant?'
    else:
        places = [name for name in walk_names(cfg) if name.split('.')[-1] == (near or [part])[0]]
        names = list_briefly(sorted(known - OF_BUILDERS)) if len(known) < 100 else ''
        meant = f'is {places[0]} meant?' if places else f'it has {names}' if names else 'leave it out'
    return f'nothing reads {part} in {where}; {meant}'


def walk_names(cfg: Config) -> list[str]:
    """The names of all settings of a config."""
    return [f'{name}.{key}' if name else key for name, node in walk({**cfg}) for key in node]


def walk_keys(cfg: Config) -> set[str]:
    return {name.split('.')[-1] for name in walk_names(cfg)}


def explain_config_error(error: BaseException) -> str | None:
    """What is wrong with a config, in one line, where an exception comes of building what it names; else None.

    The exception comes of the config if it was raised below MMEngine's build_from_cfg, or by what the runner builds
    itself. An exception other than a ValueError that this package's own code raised there is a fault of the program.
    """
    if isinstance(error, ImportError) and not (error.name or '').startswith('spec_mmdet'):
        return to_one_line(error)
    frames, last = [], None
    traceback = error.__traceback__
    while traceback:
        last = traceback.tb_frame
        module = last.f_globals.get('__name__', '')
        if last.f_code.co_name.startswith('build') and module.startswith(('mmengine.registry', 'mmengine.runner')):
            frames.append(last)
        traceback = traceback.tb_next
    own = last is not None and last.f_globals.get('__name__', '').startswith('spec_mmdet.')
    if not frames or own and not isinstance(error, ValueError):
        return None
    kind = next(
        (f.f_locals['cfg'].get('type') for f in reversed(frames) if isinstance(f.f_locals.get('cfg'), dict)), ''
    )
    kind = getattr(kind, '__name__', kind) or frames[-1].f_code.co_name.removeprefix('build_')
    near: Sequence[str] = ()
    if isinstance(error, KeyError) and (registry := frames[-1].f_locals.get('registry')):
        near = get_close_matches(str(kind), [*registry.module_dict, *(registry.parent or registry).module_dict], 1)
        if ' is not in the ' in str(error):
            return f'config: there is no {kind} in the {registry.name} registry{suggest(near)}'
    if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        near = get_close_matches(unknown[1], find_arguments(kind) or (), 1)
    name = '' if isinstance(error, (ValueError, AssertionError)) else f'{type(error).__name__}: '
    return f'config: {kind} cannot be built: {name}{to_one_line(error)}{suggest(near)}'


def suggest(near: Sequence[str]) -> str:
    return f'; is {near[0]} meant?' if near else ''


def to_one_line(error: BaseException) -> str:
    return ' '.join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
