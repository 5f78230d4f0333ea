"""Which layers of an attention module hold its projections, by the names that they have."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

_ROLE = re.compile(
    r'(?P<before>|.*_|w|linear|lin)'
    r'(?P<role>query_key_value|queries_keys_values|keys?_values?|query_key|qkv|kv|qk|queries|query|q|keys|key|k|values|value|v)'
    r'(?P<after>|_.*|proj|lin|linear)',
    re.IGNORECASE,
)
_WORDS = re.compile('(quer(?:y|ies))|(keys?)|(values?)|_')
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class NamedLayer:
    """A layer that holds projections by its name.

    Attributes:
        path: its name in the attention module.
        roles: which projections, by the name.
        module: the layer.
        transposed: whether its weight is stored with the outputs as its last dimension.
    """

    path: str
    roles: str
    module: nn.Module
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        weight = self.module.weight
        return (weight.shape[1], weight.shape[0]) if self.transposed else (weight.shape[0], weight[0].numel())


def parse_roles(name: str) -> tuple[str, str] | None:
    """The projections that a name speaks of, and the rest of the name, which those of one attention share."""
    match = _ROLE.fullmatch(name)
    if match is None:
        return None
    roles = _WORDS.sub(
        lambda word: 'q' if word[1] else 'k' if word[2] else 'v' if word[3] else '', match['role'].lower()
    )
    return roles.upper(), f'{match["before"]}*{match["after"]}'


def find_linear_layer(module: nn.Module) -> tuple[str, nn.Module, bool] | None:
    """The one layer y = W x + b of a module that is one or wraps one, as LeViT's with its normalisation.

    Returns:
        Its path in the module, the layer, and whether its weight is stored transposed; None where there is none or
        more than one.
    """
    found = [(name, part, *kind) for name, part in module.named_modules() if (kind := _kind(part))]
    return found[0] if len(found) == 1 else None


def _kind(layer: nn.Module) -> tuple[bool] | None:
    """None for what is not linear; else whether its weight is stored transposed."""
    weight = getattr(layer, 'weight', None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        return None
    if isinstance(layer, nn.Linear):
        return (False,) if _is_plain(layer, nn.Linear) else None
    for convolution in _CONVOLUTIONS:
        if isinstance(layer, convolution):
            pointwise = weight[0, 0].numel() == 1 and layer.groups == 1
            return (False,) if pointwise and _is_plain(layer, convolution) else None
    # That of transformers, which conditioning does not import.
    return (True,) if type(layer).__name__ == 'Conv1D' and weight.ndim == 2 else None


def _is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes with its weight what its base class does: others may scale or quantise it first."""
    own = next(c for c in type(layer).__mro__ if 'forward' in vars(c))
    if own is kind or parametrize.is_parametrized(layer) or layer.weight.is_meta:
        return True
    x = torch.randn(2, *layer.weight[0].shape, generator=torch.Generator().manual_seed(0))
    x = x.to(layer.weight)
    try:
        with torch.no_grad():
            return torch.allclose(layer(x), kind.forward(layer, x), rtol=1e-4, atol=1e-5)
    except Exception:  # a layer of another kind may want other inputs
        return False


def find_named_layers(attention: nn.Module) -> tuple[list[list[NamedLayer]], list[NamedLayer]]:
    """The layers of a module that by their names are projections.

    Returns:
        Groups of layers that together hold one query, key and value projection; and what is left over, layers called
        like a projection that make no such group.
    """
    children = dict(attention.named_children())
    groups: dict[str, list[NamedLayer]] = {}
    for child, part in children.items():
        if child == 'c_attn':  # GPT-2's, whose cross attention has q_attn beside it
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
    taken = [layer for group in complete for layer in group]
    return complete, [layer for group in groups.values() for layer in group if layer not in taken]
