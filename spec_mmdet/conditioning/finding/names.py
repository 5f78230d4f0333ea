"""Find the layers of an attention module that hold its projections, by their names, and faults of their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...compat import has_one_projection

_ROLE = re.compile(
    r'(?P<before>|.*_|w|linear|lin)'
    r'(?P<role>query_key_value|queries_keys_values|keys?_values?|query_key|qkv|kv|qk|queries|query|q|keys|key|k|values|value|v)'
    r'(?P<after>|_.*|proj|lin|linear)',
    re.IGNORECASE,
)
_LETTERS = {'queries': 'q', 'query': 'q', 'keys': 'k', 'key': 'k', 'values': 'v', 'value': 'v', '_': ''}
_WORDS = re.compile('|'.join(_LETTERS))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class NamedLayer:
    """A layer whose name identifies it as projections."""

    path: str  # its name in the attention module; of a parameter of that module itself, without _weight
    roles: str  # the projections in its name, in this order
    module: nn.Module  # the module that owns the weight: the layer, or the attention module itself
    transposed: bool = False  # whether its weight is stored with the outputs as its last dimension
    tensor: str = 'weight'  # the weight's name in ``module``

    @property
    def weight(self) -> Tensor:
        """The weight, as its module stores it."""
        return getattr(self.module, self.tensor)

    @property
    def parameter(self) -> str:
        """The weight's name in the attention module."""
        return f'{self.path}.weight' if self.tensor == 'weight' else self.tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs."""
        outputs, inputs = self.weight.shape[0], self.weight.shape[1:].numel()
        return (inputs, outputs) if self.transposed else (outputs, inputs)


def parse_roles(name: str) -> tuple[str, str] | None:
    """Split a layer's name into its projections, for instance 'QKV', and the rest, which is common to a group."""
    match = _ROLE.fullmatch(name)
    if match is None:
        return None
    roles = _WORDS.sub(lambda word: _LETTERS[word[0]], match['role'].lower())
    return roles.upper(), f'{match["before"]}*{match["after"]}'


def find_linear_layer(module: nn.Module) -> tuple[str, nn.Module, bool] | None:
    """Find the one layer y = W x + b in a module that is one or wraps one, as LeViT's with its normalisation.

    Returns its path, itself, and whether its weight is stored transposed; None for no layer or several.
    """
    found = [(name, part, _is_transposed(part)) for name, part in module.named_modules() if _is_linear(part)]
    return found[0] if len(found) == 1 else None


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == 'Conv1D'  # transformers', which this package does not import


def _is_linear(layer: nn.Module) -> bool:
    weight = getattr(layer, 'weight', None)
    if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return weight.shape[2:].numel() == 1 and layer.groups == 1
    return isinstance(layer, nn.Linear) or _is_transposed(layer)


def _find_own_parameters(attention: nn.Module) -> list[NamedLayer]:
    """Return the projections of nn.MultiheadAttention, unless a subclass uses other weights (torch.ao)."""
    if not isinstance(attention, nn.MultiheadAttention) or type(attention).forward is not nn.MultiheadAttention.forward:
        return []
    if has_one_projection(attention):
        return [NamedLayer('in_proj', 'QKV', attention, tensor='in_proj_weight')]
    return [NamedLayer(f'{x}_proj', x.upper(), attention, tensor=f'{x}_proj_weight') for x in 'qkv']


def find_named_layers(attention: nn.Module) -> tuple[list[list[NamedLayer]], list[NamedLayer]]:
    """Return the groups of layers that are named Q, K and V together, and other layers named like a projection."""
    if parameters := _find_own_parameters(attention):
        return [parameters], []
    children, groups = dict(attention.named_children()), {}
    for child, part in children.items():
        if child == 'c_attn':  # GPT-2; its cross attention also has q_attn
            parsed = ('KV' if 'q_attn' in children else 'QKV', '*_attn')
        elif child == 'in_proj' and re.search('attention|attn', type(attention).__name__, re.IGNORECASE):
            parsed = ('QKV', 'in_proj')
        else:
            parsed = parse_roles(child)
        layer = find_linear_layer(part) if parsed else None
        if layer:
            path, *of_layer = layer
            named = NamedLayer(f'{child}.{path}'.rstrip('.'), parsed[0], *of_layer)
            groups.setdefault(parsed[1], []).append(named)
    complete = [
        sorted(group, key=lambda layer: 'QKV'.index(layer.roles[0]))
        for group in groups.values()
        if sorted(''.join(layer.roles for layer in group)) == ['K', 'Q', 'V']
    ]
    grouped = [layer for group in complete for layer in group]
    return complete, [layer for group in groups.values() for layer in group if layer not in grouped]


def find_fault(module: nn.Module, tensor: str) -> str | None:
    """The reason why a module's tensor is no weight that a correction can be added to; None if it is one."""
    if parametrize.is_parametrized(module, tensor):
        return 'has a parametrization that is not a Correction; remove it before conditioning'
    if tensor not in dict(module.named_parameters(recurse=False)):
        return 'is recomputed by a hook, as by weight_norm, spectral_norm or prune; remove that before conditioning'
    weight = getattr(module, tensor)
    if not weight.numel():
        return f'has the shape {tuple(weight.shape)}: no rows or no columns'
    if weight.dtype not in _FLOATS or type(weight.data) is not Tensor:
        kind = weight.dtype if type(weight.data) is Tensor else type(weight.data).__name__
        return f'is quantised ({kind}); condition the model before quantising it'
    if weight.is_inference():
        return 'was made under torch.inference_mode and cannot be changed; build the model outside of it'
    if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride())):
        return 'is an expanded tensor, whose entries share memory; replace it by its clone() first'
    if not weight.is_meta and not weight.isfinite().all():
        return 'contains NaN or inf; use other weights'
    return None
