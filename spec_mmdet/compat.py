"""The private members of PyTorch and MMEngine that this package uses.

Checked against torch 2.14.1, MMEngine 0.10.7 and onedl-mmengine 0.10.12.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from torch import _weights_only_unpickler, nn
from torch.optim import Optimizer

if TYPE_CHECKING:  # conditioning needs PyTorch alone
    from mmengine.config import Config, ConfigDict
    from mmengine.optim import OptimWrapper
    from mmengine.runner import BaseLoop, Runner
    from torch.utils.data import DataLoader


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module; global hooks do not count."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


_LOADING = threading.RLock()  # only one thread at a time can replace the globals


def list_known_globals() -> dict[str, object]:
    """Return the objects that PyTorch's weights-only loading allows, by name."""
    return _weights_only_unpickler._get_allowed_globals()


@contextmanager
def use_globals(allowed: dict[str, object]) -> Iterator[None]:
    """Make PyTorch's weights-only loading allow exactly these names in this thread.

    ``torch.serialization.safe_globals`` can only add names to those that PyTorch and MMEngine allow.
    """
    thread = threading.get_ident()
    names = ('_get_allowed_globals', '_get_user_allowed_globals')
    with _LOADING:
        before = {name: getattr(_weights_only_unpickler, name) for name in names}
        for name, mine in zip(names, (allowed, {})):
            get = before[name]
            replacement = lambda get=get, mine=mine: mine if threading.get_ident() == thread else get()  # noqa: E731
            setattr(_weights_only_unpickler, name, replacement)
        try:
            yield
        finally:
            for name, get in before.items():
                setattr(_weights_only_unpickler, name, get)


@contextmanager
def cache_packages() -> Iterator[None]:
    """Let MMEngine look for a package and read its index of configs (100 YAML files) once, not for every ``_base_``."""
    from mmengine.config import config, utils

    before = config.is_installed, utils.load
    config.is_installed, utils.load = map(_make_cached, before)
    try:
        yield
    finally:
        config.is_installed, utils.load = before


_make_cached = cache(cache)  # the same cached function for the same function


def get_content(cfg: Config) -> ConfigDict:
    """Return a config's content, which can be changed in place."""
    return cfg._cfg_dict


def get_load_path(runner: Runner) -> str | None:
    """Return the checkpoint that a runner starts from."""
    return runner._load_from


def is_resuming(runner: Runner) -> bool:
    """Return whether a runner continues the training of a checkpoint."""
    return runner._resume


def is_training(runner: Runner) -> bool:
    """Return whether a runner has built its training loop."""
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)


def get_built_loops(runner: Runner) -> list[BaseLoop]:
    """Return the loops that a runner has built."""
    loops = (runner._train_loop, runner._val_loop, runner._test_loop)
    return [loop for loop in loops if loop is not None and not isinstance(loop, dict)]


def end_loader_workers(loader: DataLoader) -> None:
    """End the persistent workers of a loader."""
    loader._iterator = None


def count_accumulated_batches(optim_wrapper: OptimWrapper) -> int:
    """Return the number of iterations per optimiser step (gradient accumulation)."""
    return optim_wrapper._accumulative_counts


def count_epoch(loop: BaseLoop) -> None:
    """Increment the epoch of a training loop."""
    loop._epoch += 1


def update_val_interval(loop: BaseLoop) -> None:
    """Update the validation interval of a training loop from its ``dynamic_intervals``."""
    loop._decide_current_val_interval()


class CheckpointSteps:
    """Mixin for MMEngine's CheckpointHook with public names for the methods that a subclass overrides."""

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        self.save_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        self.update_best(runner, metrics)

    def update_best(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoint as MMEngine does."""
        super()._save_best_checkpoint(runner, metrics)


def exchanges_channels(preprocessor: nn.Module) -> bool:
    """Return whether an image preprocessor of MMEngine or MMSegmentation exchanges red and blue."""
    return getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', True))


def normalises(preprocessor: nn.Module) -> bool:
    """Return whether an image preprocessor of MMEngine subtracts a mean and divides by a standard deviation."""
    return preprocessor._enable_normalize


def get_step_pre_hooks(optimizer: Optimizer) -> list[Callable]:
    """Return the hooks that an optimiser calls before a step."""
    return list(optimizer._optimizer_step_pre_hooks.values())


def has_one_projection(attention: nn.MultiheadAttention) -> bool:
    """Return whether Q, K and V are projected by one matrix."""
    return attention._qkv_same_embed_dim


@contextmanager
def accept_bases_without_folder(folder: str) -> Iterator[None]:
    """Make MMEngine accept ``spec_mmdet::NAME.py`` instead of ``spec_mmdet::FOLDER/NAME.py`` in ``_base_``.

    It also finds packages whose distribution has a name unknown to MMEngine, such as onedl-mmsegmentation.
    """
    from mmengine.config import config

    def find(name: str) -> tuple[str, str]:
        package, path = resolve(re.sub('^spec_mmdet::(?!.*/)', rf'\g<0>{folder}/', name))
        return package if config.is_installed(package) else name.partition('::')[0], path

    resolve = config._get_package_and_cfg_path
    config._get_package_and_cfg_path = find
    try:
        yield
    finally:
        config._get_package_and_cfg_path = resolve
