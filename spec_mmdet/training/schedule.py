"""Change the schedule and the image size in every place of a config, and warm up for a share of the training."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable

from mmcv.transforms import Resize
from mmdet.engine.schedulers import QuadraticWarmupLR
from mmdet.registry import PARAM_SCHEDULERS as SCHEDULERS
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from mmengine.optim import LinearLR, OptimWrapperDict
from mmengine.optim.scheduler.param_scheduler import ReduceOnPlateauParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..configs import is_kind_of, walk
from ..data.fitting import LOOPS
from ..errors import InputError, list_briefly

WARM_UP = 0.05  # fraction of the training
# Arguments of transforms and of augmentations of batches in pixels; a border is negative.
SIZES = ('scale', 'scales', 'img_scale', 'image_size', 'crop_size', 'size', 'border', 'random_size_range')
# Entries of a scheduler's state that change during training.
PROGRESS = {'_global_step', '_last_value', 'base_values', 'best', 'cooldown_counter', 'last_step', 'num_bad_epochs'}


@PARAM_SCHEDULERS.register_module()
class WarmUpLR(LinearLR):
    """MMEngine's LinearLR for fractions of an epoch, over at least two iterations (over one, it would never end)."""

    @classmethod
    def build_iter_from_epoch(cls, *args, begin: float = 0, end: float, epoch_length: int, by_epoch=True, **kwargs):
        """Build from a config in epochs or fractions of them with convert_to_iter_based=True; see MMEngine."""
        first = int(begin * epoch_length)
        last = max(first + 2, math.ceil(end * epoch_length))
        return cls(*args, begin=first, end=last, by_epoch=False, **kwargs)


def list_schedulers(cfg: Config) -> list[dict]:
    found = cfg.get('param_scheduler') or []
    return found if isinstance(found, list) else [found]


def set_schedule(
    cfg: Config, epochs: int | None, batch_size: int | None, lr: float | None, auto_scale_lr: bool = False
) -> None:
    """Set the given parts of the schedule in all places of a config; changes ``cfg``.

    Args:
        cfg: the complete config.
        epochs: see :func:`set_epochs`.
        batch_size: batch size per device.
        lr: learning rate.
        auto_scale_lr: whether the learning rate will be scaled by the total batch size.

    Raises:
        InputError: if the config trains by iterations, or both lr and auto_scale_lr are given.
    """
    if lr and auto_scale_lr:
        raise InputError('--lr and --auto-scale-lr cannot be combined. Leave one of them out')
    if epochs:
        set_epochs(cfg, epochs)
    if batch_size:
        cfg.train_dataloader.batch_size = batch_size
    if lr:
        cfg.optim_wrapper.optimizer.lr = lr


def require_epochs(cfg: Config, option: str, instead: str) -> None:
    """Raise InputError for an option, and name other options, if a config trains by iterations."""
    if 'max_epochs' not in (cfg.get('train_cfg') or {}):
        raise InputError(f'{option}: the config trains by iterations, not epochs. Use {instead}')


def set_epochs(cfg: Config, epochs: int) -> None:
    """Set the number of epochs and rescale the whole schedule to it; changes ``cfg``.

    A warm-up in iterations becomes 5 % of the training, and a quadratic one becomes linear.

    Raises:
        InputError: if the config trains by iterations.
    """
    require_epochs(cfg, '--epochs', '--cfg-options train_cfg.max_iters=N')
    before = cfg.train_cfg.max_epochs

    def rescale(value: float) -> int:
        return max(1, round(value * epochs / before))

    cfg.train_cfg.max_epochs = epochs
    for scheduler in list_schedulers(cfg):
        if not scheduler.get('by_epoch', True):
            if scheduler.type in ('LinearLR', 'ConstantLR') and not scheduler.get('begin', 0):
                scheduler.update(
                    type='WarmUpLR', by_epoch=True, convert_to_iter_based=True, begin=0, end=WARM_UP * epochs
                )
                if 'factor' in scheduler:  # of ConstantLR
                    scheduler['start_factor'] = scheduler.pop('factor')
            continue
        if is_kind_of(scheduler, SCHEDULERS, QuadraticWarmupLR):  # wrong for fractions of an iteration
            scheduler.update(type='WarmUpLR', start_factor=0.001)
        change = rescale if not scheduler.get('convert_to_iter_based') else lambda value: value * epochs / before
        for key in ('end', 'T_max', 'step_size', 'total_steps'):
            if isinstance(scheduler.get(key), (int, float)) and math.isfinite(scheduler[key]):
                scheduler[key] = change(scheduler[key])
        if scheduler.get('begin'):
            scheduler.begin = change(scheduler.begin)
        if 'milestones' in scheduler:  # as integers: MMEngine ignores others
            scheduler.milestones = sorted({rescale(epoch) for epoch in scheduler.milestones} & set(range(1, epochs)))
    # A phase can be shorter than half an epoch.
    left = [s for s in list_schedulers(cfg) if s.get('begin', 0) < s.get('end', math.inf)]
    cfg.param_scheduler = left or None
    for _, node in walk([cfg.train_cfg, cfg.get('default_hooks'), cfg.get('custom_hooks')]):
        for key in ('val_begin', 'begin_epoch', 'switch_epoch', 'num_last_epochs'):
            if node.get(key):
                node[key] = rescale(node[key])
        if node.get('dynamic_intervals'):
            node.dynamic_intervals = [(rescale(begin), interval) for begin, interval in node.dynamic_intervals]


def set_image_size(cfg: Config, size: int) -> None:
    """Scale all sizes in pixels in a config's pipelines by one factor; changes ``cfg``.

    Args:
        cfg: the complete config.
        size: shorter side of a test image in pixels, unless the longer side reaches its limit. If test images are not
            resized, it is that of training images.

    Raises:
        InputError: if the config has no Resize.
    """
    loops = [cfg.get(f'{loop}_dataloader') for loop in reversed(LOOPS)]
    scales = [node['scale'] for _, node in walk(loops) if is_kind_of(node, TRANSFORMS, Resize) and node.get('scale')]
    if not scales:
        raise InputError(
            '--image-size: the config has no Resize with a scale, so its image size is unknown. Leave the option out, '
            'and set the sizes of the transforms in the config'
        )
    scale = scales[0] if isinstance(scales[0], (list, tuple)) else [scales[0]]
    factor = size / min(scale)
    places = [*loops, cfg.get('tta_pipeline'), (cfg.get('model') or {}).get('data_preprocessor')]
    places += [hook for hook in cfg.get('custom_hooks') or [] if 'switch_pipeline' in hook]
    done: set[int] = set()  # configs share pipelines
    for _, node in walk(places):
        if 'type' in node and id(node) not in done:
            done.add(id(node))
            node.update({key: scale_pixels(node[key], lambda v: round(v * factor)) for key in SIZES if key in node})


def scale_pixels(value: object, scale: Callable[[float], int]) -> object:
    """Scale a size or a list of sizes of a transform; fractions of an image are unchanged."""
    if isinstance(value, (list, tuple)):
        return type(value)(scale_pixels(part, scale) for part in value)
    return scale(value) or 1 if isinstance(value, (int, float)) and abs(value) > 1 else value


def apply_configured_schedule(runner: Runner, checkpoint: dict) -> None:
    """Make a resumed training use the optimiser settings and schedule of its config, and log the changes.

    MMEngine would restore both from the checkpoint. If they differ, this function replaces them in ``checkpoint``; the
    learning rate is then that of a training with the new schedule from the start. Trainings with several optimisers are
    unchanged.

    Raises:
        InputError: if the optimiser differs, or the schedule depends on earlier evaluations.
    """
    if 'optimizer' not in checkpoint or isinstance(runner.optim_wrapper, OptimWrapperDict):
        return
    optim, schedulers, state = runner.optim_wrapper, runner.param_schedulers or [], checkpoint['optimizer']
    groups = [*state['param_groups'], state.get('base_param_settings') or {}]
    arguments = {name for kind in type(optim.optimizer).__mro__ for name in inspect.signature(kind.__init__).parameters}
    arguments -= {'params'}
    changed: dict[str, str] = {}
    for ours, theirs in zip(optim.param_groups, groups):
        for key, value in ours.items():
            scheduled = f'initial_{key}' in ours or key == 'betas' and 'initial_momentum' in ours
            if scheduled or not (key in arguments or key.startswith('initial_')):
                continue
            if key not in theirs and key in arguments and theirs and not isinstance(value, bool | None):
                raise InputError(
                    f'the checkpoint is not from a training with {type(optim.optimizer).__name__} (it has no {key}). '
                    'Start a new training from its weights with --cfg-options load_from=FILE'
                )
            before = theirs.get(key)
            if theirs and _to_tuple(before) != _to_tuple(value):
                changed.setdefault(key.removeprefix('initial_'), f'{before} -> {value}')

    def get_settings(scheduler: dict) -> dict:
        return {key: value for key, value in scheduler.items() if key not in PROGRESS}

    saved = checkpoint.get('param_schedulers', [])
    if [*map(get_settings, saved)] != [get_settings(scheduler.state_dict()) for scheduler in schedulers]:
        changed['param_scheduler'] = 'changed'
    if not changed:
        return
    if any(isinstance(scheduler, ReduceOnPlateauParamScheduler) for scheduler in schedulers):
        raise InputError(
            f'the config differs from the checkpoint ({list_briefly(changed)}), and ReduceOnPlateau cannot continue '
            'with other settings. Resume with the same ones, or start a new training with --cfg-options load_from=FILE'
        )
    _replay(runner, checkpoint['meta'])
    checkpoint['param_schedulers'] = [scheduler.state_dict() for scheduler in schedulers]
    arguments |= {scheduler.param_name for scheduler in schedulers}
    for ours, theirs in zip(optim.param_groups, groups):
        theirs.update({key: v for key, v in ours.items() if key in arguments or key.startswith('initial_')})
    changes = ', '.join(f'{key} {change}' for key, change in changed.items())
    runner.logger.warning(f"the config's settings replace the checkpoint's: {changes}")


def _to_tuple(value: object) -> tuple:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _replay(runner: Runner, meta: dict) -> None:
    """Step a runner's new schedulers to the position of a checkpoint, given its meta."""
    length, by_epoch = len(runner.train_dataloader), isinstance(runner.train_loop, EpochBasedTrainLoop)
    iterations = meta['epoch'] * length + meta.get('iter_in_epoch', 0) if by_epoch else meta['iter']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # PyTorch warns if a scheduler steps before the optimiser
        for iteration in range(1, iterations + 1):
            ends_epoch = by_epoch and iteration % length == 0
            for unit in (False, True) if ends_epoch else (False,):
                for scheduler in runner.param_schedulers or []:
                    if scheduler.by_epoch is unit:
                        scheduler.step()
