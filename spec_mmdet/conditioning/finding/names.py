"""Find the layers of an attention module that hold its projections, by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...compat import has_one_projection

_ROLE = re.compile(
    r'(?P<before>|.*_|w|linear|lin)'
    r'(?P<role>query_key_value|queries_keys_values|keys?_values?|query_key|qkv|kv|qk|queries|query|q|keys|key|k|values|value|v)'
    r'(?P<after>|_.*|proj|lin|linear)',
    re.IGNORECASE,
)
_LETTERS = {'queries': 'q', 'query': 'q', 'keys': 'k', 'key': 'k', 'values': 'v', 'value': 'v', '_': ''}
_WORDS = re.compile('|'.join(_LETTERS))


@dataclass(frozen=True)
class NamedLayer:
    """A layer whose name identifies it as projections.

    Attributes:
        path: its name in the attention module; of a parameter of that module itself, without its last part, _weight.
        roles: the projections in its name, in this order.
        module: the module that owns the weight: the layer, or the attention module itself.
        transposed: whether its weight is stored with the outputs as its last dimension.
        tensor: the weight's name in ``module``.
    """

    path: str
    roles: str
    module: nn.Module
    transposed: bool = False
    tensor: str = 'weight'

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

    Returns:
        Its path in the module, the layer, and whether its weight is stored transposed; None for no layer or several.
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
    """Find the layers of a module that have names of projections.

    Returns:
        Groups of layers that together hold one query, key and value projection; and the remaining layers, which are
        named like a projection but form no such group.
    """
    if parameters := _find_own_parameters(attention):
        return [parameters], []
    children = dict(attention.named_children())
    groups: dict[str, list[NamedLayer]] = {}
    for child, part in children.items():
        if child == 'c_attn':  # GPT-2; its cross attention also has q_attn
            parsed = ('KV' if 'q_attn' in children else 'QKV', '*_attn')
        elif child == 'in_proj' and re.search('attention|attn', type(attention).__name__, re.IGNORECASE):
            parsed = ('QKV', 'in_proj')
        else:
            parsed = parse_roles(child)
        layer = find_linear_layer(part) if parsed else None
        if parsed and layer:
            path, module, transposed = layer
            named = NamedLayer(f'{child}.{path}'.rstrip('.'), parsed[0], module, transposed)
            groups.setdefault(parsed[1], []).append(named)
    complete = [
        sorted(group, key=lambda layer: 'QKV'.index(layer.roles[0]))
        for group in groups.values()
        if sorted(''.join(layer.roles for layer in group)) == ['K', 'Q', 'V']
    ]
    grouped = [layer for group in complete for layer in group]
    return complete, [layer for group in groups.values() for layer in group if layer not in grouped]
