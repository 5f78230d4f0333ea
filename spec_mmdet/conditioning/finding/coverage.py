"""What looks like attention in a model, so that none of it is left out in silence."""

from __future__ import annotations

import inspect
import re

from torch import nn

from .names import find_named_layers

_CALLED_ATTENTION = re.compile(r'attn|attention|mhsa|mha(?![a-z])|gpsa|xca|mla(?![a-z])', re.IGNORECASE)
# Channels weighed by a gate are called attention, too; so are parts of attention that are no attention themselves.
_OTHERS = re.compile(
    r'SE(?![a-z])|SqueezeExc|SqueezeAnd|Excit|Eca(?![a-z])|Cbam|ChannelAtt|SpatialAtt|GlobalContext|SplitAttn|'
    r'Norm|Dropout|Output$'
)
_COMPUTES = re.compile(r'scaled_dot_product_attention|ALL_ATTENTION_FUNCTIONS|attention_interface|flex_attention')
_PRODUCT = re.compile(r'matmul|einsum|bmm|\s@\s')
_HALF = 'is called like a projection, but makes no query, key and value with others'


def uncovered(model: nn.Module, taken: set[nn.Module]) -> dict[str, str]:
    """The modules that look like attention but whose projections were not taken, and what each looks like.

    Attention is what is called so, by its class or by its parent; what calls an attention function or a softmax beside
    a product of matrices; and what has layers that are called like projections.

    Args:
        model: any.
        taken: its attention modules whose projections were.
    """
    modules = dict(model.named_modules())
    done = {name for name, module in modules.items() if module in taken}
    around = {name[:i] for name in done for i, letter in enumerate(f'{name}.') if letter == '.'} | {''}
    found = {}
    for name, module in modules.items():
        left, kind = find_named_layers(module)[1], type(module).__name__
        called = _CALLED_ATTENTION.search(f'{kind} {name.rpartition(".")[2]}')
        if left and (called or name in done or len({layer.roles for layer in left}) > 1):
            found |= {f'{name}.{layer.path}'.lstrip('.'): _HALF for layer in left}
        elif name in around or _OTHERS.search(kind) or any(_is_inside(name, other) for other in done):
            continue
        elif called and _weights(module) > 1:
            found[name] = f'is called attention ({kind})'
        elif any(module.children()) and _weights(module) and _computes_attention(module):
            found[name] = f'computes attention ({kind})'
    # What is said of a part need not be said of the whole.
    return {name: why for name, why in found.items() if not any(_is_inside(other, name) for other in found)}


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f'{other}.') if other else bool(name)


def _weights(module: nn.Module) -> int:
    """How many of its parameters are matrices, but for tables of embeddings."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return sum(p.ndim > 1 and id(p) not in tables for p in module.parameters())


def _computes_attention(module: nn.Module) -> bool:
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # made in a console, or not in Python
        return False
    return bool(_COMPUTES.search(source) or ('softmax' in source and _PRODUCT.search(source)))
