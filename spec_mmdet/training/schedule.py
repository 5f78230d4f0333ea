"""Options that concern many places of a config: epochs, image size; and a warm-up that is a share of the training."""

from __future__ import annotations

import math
from collections.abc import Callable

from mmengine.config import Config
from mmengine.optim import LinearLR
from mmengine.registry import PARAM_SCHEDULERS

from ..data.fitting import LOOPS, walk
from ..errors import InputError

WARM_UP = 0.05  # of the training
SIZES = ('scale', 'scales', 'img_scale', 'image_size', 'crop_size', 'size')  # in pixels, as transforms call them


@PARAM_SCHEDULERS.register_module()
class WarmUpLR(LinearLR):
    """MMEngine's LinearLR over a part of an epoch or several, and at least two iterations: over one, it never ends."""

    @classmethod
    def build_iter_from_epoch(cls, *args, begin: float = 0, end: float, epoch_length: int, by_epoch=True, **kwargs):
        """From a config in epochs, which may be fractions, with convert_to_iter_based=True; see MMEngine."""
        first = int(begin * epoch_length)
        last = max(first + 2, math.ceil(end * epoch_length))
        return cls(*args, begin=first, end=last, by_epoch=False, **kwargs)


def schedulers(cfg: Config) -> list[dict]:
    found = cfg.get('param_scheduler') or []
    return found if isinstance(found, list) else [found]


def set_epochs(cfg: Config, epochs: int) -> None:
    """Train for so many epochs, the whole schedule made longer or shorter with them; changes ``cfg``.

    A warm-up of so many iterations becomes one of 5 % of the training.

    Raises:
        InputError: if the config trains by iterations.
    """
    if 'max_epochs' not in (cfg.get('train_cfg') or {}):
        raise InputError('--epochs: the config trains by iterations; say --cfg-options train_cfg.max_iters=N')
    factor = epochs / cfg.train_cfg.max_epochs

    def scaled(value: float) -> int:
        return max(1, round(value * factor))

    cfg.train_cfg.max_epochs = epochs
    for scheduler in schedulers(cfg):
        if not scheduler.get('by_epoch', True):
            if scheduler.type in ('LinearLR', 'ConstantLR') and not scheduler.get('begin', 0):
                scheduler.update(
                    type='WarmUpLR', by_epoch=True, convert_to_iter_based=True, begin=0, end=WARM_UP * epochs
                )
            continue
        whole = scaled if not scheduler.get('convert_to_iter_based') else lambda value: value * factor
        for key in ('end', 'T_max', 'step_size', 'total_steps'):
            if isinstance(scheduler.get(key), (int, float)) and math.isfinite(scheduler[key]):
                scheduler[key] = whole(scheduler[key])
        if scheduler.get('begin'):
            scheduler.begin = whole(scheduler.begin)
        if 'milestones' in scheduler:  # in whole epochs: MMEngine passes over those between two iterations
            scheduler.milestones = sorted({scaled(epoch) for epoch in scheduler.milestones} & set(range(1, epochs)))
    for _, node in walk([cfg.train_cfg, cfg.get('default_hooks'), cfg.get('custom_hooks')]):
        for key in ('val_begin', 'begin_epoch', 'switch_epoch', 'num_last_epochs'):
            if node.get(key):
                node[key] = scaled(node[key])
        if node.get('dynamic_intervals'):
            node.dynamic_intervals = [(scaled(begin), interval) for begin, interval in node.dynamic_intervals]


def set_image_size(cfg: Config, size: int) -> None:
    """Have images be so large; all sizes in pixels that a config's pipelines name keep their ratio; changes ``cfg``.

    Args:
        cfg: the whole config.
        size: the shorter side of a test image, in pixels, where the longer one is not the limit.

    Raises:
        InputError: if the config's test pipeline has no Resize.
    """
    test = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    scales = [node['scale'] for _, node in walk(test) if node.get('type') == 'Resize' and 'scale' in node]
    if not scales:
        raise InputError('--image-size: the config has no Resize with a scale in its test pipeline to measure it by')
    scale = scales[0] if isinstance(scales[0], (list, tuple)) else [scales[0]]
    factor = size / min(scale)
    places = [cfg.get(f'{loop}_dataloader') for loop in LOOPS] + [cfg.get('tta_pipeline')]
    places.append((cfg.get('model') or {}).get('data_preprocessor'))
    done: set[int] = set()  # configs share pipelines
    for _, node in walk(places):
        if 'type' in node and id(node) not in done:
            done.add(id(node))
            node.update({key: in_pixels(node[key], lambda v: round(v * factor)) for key in SIZES if key in node})


def in_pixels(value: object, scale: Callable[[float], int]) -> object:
    """A transform's size, or list of sizes, scaled; fractions of an image stay."""
    if isinstance(value, (list, tuple)):
        return type(value)(in_pixels(part, scale) for part in value)
    return max(1, scale(value)) if isinstance(value, (int, float)) and value > 1 else value
