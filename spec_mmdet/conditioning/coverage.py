"""What looks like attention in a model, so that none of it is left out in silence."""

from __future__ import annotations

import inspect
import re

from torch import nn

from .names import linear_layer, named_projections

_CALLED_ATTENTION = re.compile(r'attn|attention|mhsa|mha(?![a-z])|gpsa|xca|mla(?![a-z])', re.IGNORECASE)
# Channels weighed by a gate are called attention, too; so are parts of attention that are no attention themselves.
_OTHERS = re.compile(r'SE|Squeeze|Excit|Eca|Cbam|ChannelAtt|SpatialAtt|GlobalContext|SplitAttn|Norm|Dropout')
_COMPUTES = re.compile(r'scaled_dot_product_attention|ALL_ATTENTION_FUNCTIONS|attention_interface|flex_attention')
_PRODUCT = re.compile(r'matmul|einsum|bmm|\s@\s')


def overlooked(model: nn.Module, taken: set[nn.Module]) -> dict[str, str]:
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
        left = named_projections(module)[1]
        called = _CALLED_ATTENTION.search(f'{type(module).__name__} {name.rpartition(".")[2]}')
        if left and (called or name in done or len(left) > 1):
            for layer in left:
                found[f'{name}.{layer}'.lstrip('.')] = 'is called like a projection, but makes no query, key and value'
        elif (
            name in around
            or any(_is_inside(name, other) for other in done)
            or _OTHERS.search(type(module).__name__)
            or not _has_weights(module)
        ):
            continue
        elif called:
            found[name] = f'is called attention ({type(module).__name__})'
        elif _computes_attention(module):
            found[name] = f'computes attention ({type(module).__name__})'
    # What is said of a part need not be said of the whole.
    return {name: why for name, why in found.items() if not any(_is_inside(other, name) for other in found)}


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(f'{other}.') if other else bool(name)


def _has_weights(module: nn.Module) -> bool:
    own = any(p.ndim > 1 for p in module.parameters(recurse=False))
    return own or any(linear_layer(part) for part in module.modules())


def _computes_attention(module: nn.Module) -> bool:
    if not any(linear_layer(part) for part in module.children()):
        return any(p.ndim > 1 for p in module.parameters(recurse=False)) and _source_computes(type(module))
    return _source_computes(type(module))


def _source_computes(kind: type[nn.Module]) -> bool:
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):  # made in a console, or not in Python
        return False
    return bool(_COMPUTES.search(source) or ('softmax' in source and _PRODUCT.search(source)))
