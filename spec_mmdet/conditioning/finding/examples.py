"""What a model's attention modules get as their inputs when the model is run on an example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import InputError
from .names import find_named_layers

# The positional and the keyword arguments of one call.
Call = tuple[tuple, dict]


def record_calls(model: nn.Module, example: object) -> dict[str, Call]:
    """The inputs that each module with projections gets in its first call when the model is run on an example.

    Args:
        model: run in evaluation mode and without gradient; left as it is.
        example: a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        InputError: if the model does not run on it.
    """
    calls: dict[str, Call] = {}
    handles = []
    for name, module in model.named_modules():
        if find_named_layers(module)[0]:

            def remember(module, args, kwargs, name=name):
                calls.setdefault(name, (_kept(args), {key: _kept(value, key) for key, value in kwargs.items()}))

            handles.append(module.register_forward_pre_hook(remember, with_kwargs=True))
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(example, dict):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    except Exception as error:
        raise InputError(f'example: the model does not run on it: {str(error).splitlines()[0]}') from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return calls


def _kept(value: object, name: str = '') -> object:
    """A value as the experiment wants it: in double precision and, of what is kept between calls, nothing."""
    if 'past' in name or 'cache' in name:
        return None

    def keep(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu()
        return x.double() if x.is_floating_point() else x.clone()

    return tree_map(keep, value)


def make_example(model: nn.Module) -> object | None:
    """An input for a model that says what it takes, as timm's and transformers' do; None for others."""
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters(), torch.zeros(()))

    def image(channels: int, size: int | tuple[int, int]) -> Tensor:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(1, channels, height, width, generator=generator).to(parameter)

    timm_says = getattr(model, 'pretrained_cfg', None)
    if isinstance(timm_says, dict) and 'input_size' in timm_says:
        channels, *size = timm_says['input_size']
        return image(channels, getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size)
    config, takes = getattr(model, 'config', None), getattr(model, 'main_input_name', None)
    if takes == 'pixel_values':
        vision = getattr(config, 'vision_config', config)
        return {takes: image(getattr(vision, 'num_channels', 3), getattr(vision, 'image_size', 224))}
    if takes == 'input_ids':
        tokens = torch.arange(2, 14, device=parameter.device)[None]
        both = getattr(config, 'is_encoder_decoder', False)
        return {takes: tokens} | ({'decoder_input_ids': tokens} if both else {})
    return None
