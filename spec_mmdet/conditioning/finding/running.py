"""Run models and modules on example inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import InputError
from .names import find_named_layers

# The positional and the keyword arguments of one call.
Call = tuple[tuple, dict]


@contextmanager
def use_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass(frozen=True)
class Run:
    """A successful call of a model or a part of it."""

    module: nn.Module
    args: tuple
    kwargs: dict

    def __call__(self) -> object:
        """Call the module in evaluation mode, without gradients; restore its mode and the random state."""
        cuda = {p.device.index for p in self.module.parameters() if p.is_cuda}
        with use_evaluation_mode(self.module), torch.no_grad(), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(0)
            return self.module(*self.args, **self.kwargs)


def run_on(model: nn.Module, example: object) -> Run:
    """Return a run of a model on an example; raise an InputError if the model does not run on it."""
    kwargs = example if isinstance(example, dict) else {}
    run = Run(model, () if kwargs else example if isinstance(example, tuple) else (example,), kwargs)
    try:
        run()
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f'example: the model fails on it ({reason}). Pass an input that the model accepts') from error
    return run


def find_runs(model: nn.Module, example: object = None) -> list[Run]:
    """Find calls that run a model: on the example, or an input made for it, or else its parts on random tokens."""
    if example is not None:
        return [run_on(model, example)]
    if any(parameter.is_meta for parameter in model.parameters()):
        return []
    if (made := make_example(model)) is not None:
        with suppress(InputError):
            return [run_on(model, made)]
    return _find_runs_of_parts(model)


def _find_runs_of_parts(module: nn.Module) -> list[Run]:
    matrix = next((p for p in module.parameters() if p.ndim > 1 and p.is_floating_point()), None)
    for width in () if matrix is None else dict.fromkeys([matrix.shape[1], matrix.shape[0]]):
        for args, kwargs in make_calls(module, width, matrix):
            run = Run(module, args, kwargs)
            with suppress(Exception):  # the module may not take these inputs
                run()
                return [run]
    return [run for child in module.children() for run in _find_runs_of_parts(child)]


def record_calls(model: nn.Module, example: object) -> dict[str, Call]:
    """Record the arguments of the first call of each module with projections, in double precision."""
    calls: dict[str, Call] = {}
    handles = []
    for name, module in model.named_modules():
        if find_named_layers(module)[0]:

            def remember(module, args, kwargs, name=name):
                calls.setdefault(name, (_copy(args), {key: _copy(value, key) for key, value in kwargs.items()}))

            handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    try:
        run_on(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _copy(value: object, name: str = '') -> object:
    """Copy a value to the CPU in double precision; caches of earlier calls become None."""
    if 'past' in name or 'cache' in name:
        return None

    def copy(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x.double() if x.is_floating_point() else x.clone()

    return tree_map(copy, value)


def make_example(model: nn.Module) -> object | None:
    """Make an input for a model that defines its inputs (timm, transformers); None for others."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters(), torch.zeros(()))

    def make_image(channels: int, size: int | tuple[int, int]) -> Tensor:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(1, channels, height, width, generator=generator).to(parameter)

    timm_config = getattr(model, 'pretrained_cfg', None)
    if isinstance(timm_config, dict) and 'input_size' in timm_config:
        channels, *size = timm_config['input_size']
        return make_image(channels, getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size)
    config, name = getattr(model, 'config', None), getattr(model, 'main_input_name', None)
    if name == 'pixel_values':
        vision = getattr(config, 'vision_config', config)
        return {name: make_image(getattr(vision, 'num_channels', 3), getattr(vision, 'image_size', 224))}
    if name == 'input_ids':
        tokens = torch.arange(2, 14, device=parameter.device)[None]
        encodes_and_decodes = getattr(config, 'is_encoder_decoder', False)
        return {name: tokens} | ({'decoder_input_ids': tokens} if encodes_and_decodes else {})
    return None


_TOKENS = re.compile(r'key|value|kv|context|encoder|memory|residual|^y$|hidden_states|query')


def make_calls(module: nn.Module, width: int, like: Tensor) -> Iterator[Call]:
    """Make calls that a module could take: random tokens of ``width`` channels in several shapes, of the type of like.

    Further required arguments get tokens or sizes by their names, and otherwise None.
    """
    generator = torch.Generator().manual_seed(2)
    try:
        _, *others = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return
    required = [p for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for h in (3, 4):
        for shape in ((2, h * h, width), (2, width, h, h), (2, h, h, width), (h * h, width)):
            kwargs: dict[str, object] = {}
            for name in (p.name for p in required):
                if name in ('H', 'W', 'height', 'width'):
                    kwargs[name] = h
                elif re.search('size|shape|^hw$', name):
                    kwargs[name] = (h, h)
                elif _TOKENS.search(name):
                    kwargs[name] = torch.randn(shape, generator=generator).to(like)
                else:
                    kwargs[name] = None
            yield (torch.randn(shape, generator=generator).to(like),), kwargs
