"""Finding the query, key and value projections in a model that exists already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .correction import Correction
from .rows import Stack

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
    """Query, key or value projections of one shape that an attention module holds in one weight.

    Attributes:
        name: where it is in the model, for instance 'blocks.0.attn.qkv'.
        stack: which projections they are, and which rows of the weight they take.
        attention: the attention module.
        module: the module that owns the weight: a linear layer, or the attention module itself.
        tensor: the weight's name in it.
    """

    name: str
    stack: Stack
    attention: nn.Module
    module: nn.Module
    tensor: str = 'weight'

    @property
    def roles(self) -> str:
        """Which projections they are: 'QKV', 'KV', 'Q', 'K' or 'V', for instance."""
        return self.stack.roles

    @property
    def heads(self) -> int | None:
        """How many heads each of the projections has, where that is known."""
        return self.stack.heads

    @property
    def correction(self) -> Correction | None:
        """What is added to the weight, if it is conditioned."""
        for correction in corrections(self.module, self.tensor):
            if correction.stack in (None, self.stack):
                return correction
        own = getattr(self.attention, 'correction', None)
        return own if isinstance(own, Correction) else None

    @property
    def weight(self) -> Tensor:
        """The trained weight without its correction, as its module stores it."""
        if parametrize.is_parametrized(self.module, self.tensor):
            return self.module.parametrizations[self.tensor].original
        return getattr(self.module, self.tensor)

    @property
    def W(self) -> Tensor:
        """The trained weight, without its correction, shape (projections, D, k), in torch's layout (rows: outputs)."""
        return self._blocks(self.weight.detach())

    @property
    def W_plus_C(self) -> Tensor | None:
        """W + C, shape of W; None where there is no correction."""
        return None if self.correction is None else self._blocks(self.correction(self.weight.detach()))

    def make_correction(self, type: str = 'identity', lam: float | None = None, per_head: bool = False) -> Correction:
        """The correction that these projections would get, for the weight as its module stores it.

        Raises:
            ValueError: on arguments that :class:`Correction` refuses.
        """
        return Correction(self.weight, type, lam, per_head, stack=self.stack)

    def _blocks(self, weight: Tensor) -> Tensor:
        return self.stack.take(weight).unflatten(0, (len(self.roles), -1))


def corrections(module: nn.Module, tensor: str) -> list[Correction]:
    """The corrections that parametrize a module's tensor."""
    if not parametrize.is_parametrized(module, tensor):
        return []
    return [part for part in module.parametrizations[tensor] if isinstance(part, Correction)]


def projections(model: nn.Module) -> Iterator[Projection]:
    """Find the query, key and value projections in a model, by the names that attention modules give them.

    Raises:
        InputError: where a stacked projection cannot be told into query, key and value.
    """
    for name, module in model.named_modules():
        heads = _heads(module)
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                yield Projection(f'{name}.in_proj'.lstrip('.'), Stack('QKV', heads), module, module, 'in_proj_weight')
            else:
                for role in 'qkv':
                    path = f'{name}.{role}_proj'.lstrip('.')
                    yield Projection(path, Stack(role.upper(), heads), module, module, f'{role}_proj_weight')
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
                yield Projection(path, Stack(roles, heads), module, linear[child])
            break


def _heads(attention: nn.Module) -> int | None:
    for name in ('num_heads', 'num_attention_heads', 'heads'):
        if isinstance(getattr(attention, name, None), int):
            return getattr(attention, name)
    return None
