"""Finding the query, key and value projections in a model that exists already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .correction import Correction

# How the modules of timm, transformers, diffusers and mmdet name the linear layers that hold the projections.
_LAYOUTS = (
    {'qkv': 'QKV'},
    {'to_qkv': 'QKV'},
    {'q': 'Q', 'k': 'K', 'v': 'V'},
    {'q': 'Q', 'kv': 'KV'},
    {'wq': 'Q', 'wk': 'K', 'wv': 'V'},
    {'query': 'Q', 'key': 'K', 'value': 'V'},
    {'q_proj': 'Q', 'k_proj': 'K', 'v_proj': 'V'},
    {'to_q': 'Q', 'to_k': 'K', 'to_v': 'V'},
)


@dataclass(frozen=True)
class Projection:
    """A weight of an attention module that holds query, key or value projections, stacked along its rows.

    Attributes:
        name: where it is in the model, for instance 'blocks.0.attn.qkv'.
        roles: which projections are stacked in it, in order: 'QKV', 'KV', 'Q', 'K' or 'V'.
        attention: the attention module.
        module: the module that owns the weight: a linear layer, or the attention module itself.
        tensor: the weight's name in it.
    """

    name: str
    roles: str
    attention: nn.Module
    module: nn.Module
    tensor: str = 'weight'

    @property
    def correction(self) -> Correction | None:
        """What is added to the weight, if it is conditioned."""
        if parametrize.is_parametrized(self.module, self.tensor):
            for parametrization in self.module.parametrizations[self.tensor]:
                if isinstance(parametrization, Correction):
                    return parametrization
        own = getattr(self.attention, 'correction', None)
        return own if isinstance(own, Correction) else None

    @property
    def W(self) -> Tensor:
        """The trained weight, without its correction, shape (projections, D, k), in torch's layout (rows: outputs)."""
        if parametrize.is_parametrized(self.module, self.tensor):
            weight = self.module.parametrizations[self.tensor].original
        else:
            weight = getattr(self.module, self.tensor)
        return weight.detach().unflatten(0, (len(self.roles), -1))

    @property
    def W_plus_C(self) -> Tensor | None:
        """W + C, shape of W; None where there is no correction."""
        if self.correction is None:
            return None
        return self.correction(self.W.flatten(0, 1)).unflatten(0, (len(self.roles), -1))

    @property
    def heads(self) -> int | None:
        """The attention's number of heads, where it says so."""
        for name in ('num_heads', 'num_attention_heads', 'heads'):
            if isinstance(getattr(self.attention, name, None), int):
                return getattr(self.attention, name)
        return None


def projections(model: nn.Module) -> Iterator[Projection]:
    """Find the query, key and value projections in a model, by the names that attention modules give them.

    Raises:
        InputError: where a stacked projection cannot be told into query, key and value.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                yield Projection(f'{name}.in_proj'.lstrip('.'), 'QKV', module, module, 'in_proj_weight')
            else:
                for role in 'qkv':
                    path = f'{name}.{role}_proj'.lstrip('.')
                    yield Projection(path, role.upper(), module, module, f'{role}_proj_weight')
            continue
        linear = {child: part for child, part in module.named_children() if isinstance(part, nn.Linear)}
        for layout in _LAYOUTS:
            if not layout.keys() <= linear.keys():
                continue
            for child, roles in layout.items():
                path = f'{name}.{child}'.lstrip('.')
                # timm's MaxViT orders the rows of its qkv by head first.
                if len(roles) > 1 and (linear[child].out_features % len(roles) or getattr(module, 'head_first', False)):
                    raise InputError(f'{path}: its rows are not {", then ".join(roles)}; such a layer is not supported')
                yield Projection(path, roles, module, linear[child])
            break
