"""Find attention whose projections were not found, by names and by running the model."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .names import find_named_layers
from .running import Run

_CALLED_ATTENTION = re.compile(r'attn|attention|mhsa|mha(?![a-z])|gpsa|xca|mla(?![a-z])', re.IGNORECASE)
# Gates that weight channels are called attention, too, and so are parts of attention modules.
_OTHERS = re.compile(
    r'SE(?![a-z])|SqueezeExc|SqueezeAnd|Excit|Eca(?![a-z])|Cbam|ChannelAtt|SpatialAtt|GlobalContext|SplitAttn|'
    r'Norm|Dropout|Output$'
)
_HALF = 'is named like a projection, but the other projections of this attention were not found'


def find_uncovered(model: nn.Module, attention: set[nn.Module], runs: list[Run]) -> dict[str, str]:
    """Find a model's modules that look like attention but are not in ``attention``, with the reason for each.

    They compute attention from something else than known projections when the runs are called, or have a name of
    attention or projections.
    """
    modules = dict(model.named_modules())
    covered = {name for name, module in modules.items() if module in attention}
    found: dict[str, str] = {}
    watch = _Watch(model, attention)
    for run in runs:
        watch.observe(run)
    for name, module in modules.items():
        if module in watch.found:
            found[name] = f'computes attention ({type(module).__name__})'
        kind, remaining = type(module).__name__, find_named_layers(module)[1]
        called = _CALLED_ATTENTION.search(f'{kind} {name.rpartition(".")[2]}')
        if remaining and (called or name in covered or len({layer.roles for layer in remaining}) > 1):
            found |= {f'{name}.{layer.path}'.lstrip('.'): _HALF for layer in remaining}
        elif any(_contains(a, b) for other in covered for a, b in ((name, other), (other, name))):
            continue
        elif called and not _OTHERS.search(kind) and _count_matrices(module) > 1:
            found.setdefault(name, f'is named attention ({kind})')
    # Of nested modules only the innermost are listed.
    return {name: why for name, why in found.items() if not any(_contains(name, o) and name != o for o in found)}


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or inner.startswith(f'{outer}.') or not outer


def _count_matrices(module: nn.Module) -> int:
    """Number of its parameters that are matrices, without tables of embeddings."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    return sum(p.ndim > 1 and id(p) not in tables for p in module.parameters())


_ATTENTION = {'scaled_dot_product_attention', 'multi_head_attention_forward', 'flex_attention'}
_PRODUCTS = {'matmul', '__matmul__', '__rmatmul__', 'mm', 'bmm', 'einsum', 'baddbmm', 'addmm', 'linear', 'bilinear'}
_PRODUCTS |= {'conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d'}


class _Watch(TorchFunctionMode):
    """Marks tensors while a model runs, to see products of activations with products of activations.

    Attention multiplies the values with (a function of) the product of queries and keys, with no weights in between. A
    tensor's marks are 'activation', if it depends on the input; 'product', if it is such a product or a function of
    one; and 'projected', if it comes from the projections of an attention module within that module.
    """

    def __init__(self, model: nn.Module, attention: set[nn.Module]) -> None:
        super().__init__()
        self.attention = attention
        layers = [layer for module in attention for group in find_named_layers(module)[0] for layer in group]
        self.projections = {id(layer.weight) for layer in layers}
        self.inside = {id(p) for module in attention for p in module.parameters()}
        self.stack: list[nn.Module] = []
        self.found: list[nn.Module] = []
        self.marks: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def observe(self, run: Run) -> None:
        """Run a module and note what computes attention."""
        self.marks = WeakIdKeyDictionary()
        for x in tree_leaves((run.args, run.kwargs)):
            if isinstance(x, Tensor):
                self.marks[x] = {'activation'}
        handles = []
        for module in run.module.modules():
            handles.append(module.register_forward_pre_hook(lambda module, args: self.stack.append(module)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                run()
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module, args: tuple, out: object) -> None:
        self.stack.pop()
        if module in self.attention:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x in self.marks:
                    self.marks[x] = {'activation'}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marked = [self.marks[x] for x in tensors if x in self.marks]
        projects = any(id(x) in self.projections for x in tensors)
        if not marked and not projects:
            return out
        name = getattr(func, '__name__', '')
        marks = set().union(*marked)
        if name in _ATTENTION:
            self._see(projects or all('projected' in self.marks.get(x, ()) for x in tensors[:2]))
            marks.add('product')
        elif name in _PRODUCTS:
            if sum('activation' in x or 'projected' in x for x in marked) > 1:
                if any('product' in x for x in marked):
                    self._see(all('projected' in x for x in marked))
                marks.add('product')
            elif not any(id(x) in self.inside for x in tensors):  # a layer outside of attention modules
                marks &= {'activation'}
        if projects:
            marks.add('projected')
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.marks[x] = set(marks)
        return out

    def _see(self, known: bool) -> None:
        """Note attention in the innermost running module that has weight matrices, unless its projections are known."""
        owner = next((module for module in reversed(self.stack) if _count_matrices(module)), None)
        if not known and owner is not None and owner not in self.found:
            self.found.append(owner)
