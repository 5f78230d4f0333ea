"""Read from a run which weights a model computes its attention with, without regard to names and layouts.

Attention is computed by torch's function or by a softmax between two products; there the queries, keys and values
are intercepted. Autograd then gives the rows of the weights that they come from. This module does not use
spec_mmdet.conditioning.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.einsum}
PRODUCTS |= {torch.baddbmm, torch.Tensor.baddbmm, torch.Tensor.__rmatmul__}
SOFTMAX = {torch.softmax, torch.Tensor.softmax, nn.functional.softmax}


@dataclass
class Event:
    """One computation of attention: for each role, the rows of each parameter that it comes from, also head by head."""

    rows: dict[str, dict[str, frozenset[int]]] = field(default_factory=dict)
    heads: dict[str, list[dict[str, frozenset[int]]]] = field(default_factory=dict)


class _Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.products, self.softmaxes, self.events = [], [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ('query', 'key', 'value')
            self.events.append(dict(zip('QKV', [*args[:3], *(kwargs[n] for n in names[len(args[:3]) :])])))
        if func is nn.functional.multi_head_attention_forward:
            self.events.append(_of_multihead_attention(*args, **kwargs))
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim > 1][-2:]
            if len(operands) == 2 and out.grad_fn is not None:
                self.products.append((out, operands))
        elif func in SOFTMAX and out.grad_fn is not None:
            self.softmaxes.append((args[0] if args else kwargs['input'], out))
        return out

    def eager_events(self):
        """A softmax over the product of queries and keys whose result is multiplied by the values."""
        made_by = {out.grad_fn: operands for out, operands in self.products}
        for scores, weights in self.softmaxes:
            found = _first(scores.grad_fn, made_by)
            for _, operands in self.products:
                for weight, value in (operands, operands[::-1]):
                    if found and _reaches(weight.grad_fn, weights.grad_fn, made_by):
                        yield {'Q': found[0], 'K': found[1], 'V': value}


def _of_multihead_attention(query, key, value, width, heads, in_proj_weight, *args, **kwargs):
    """Follow torch's documentation: Q, K and V stacked in in_proj_weight, or separate."""
    if kwargs.get('use_separate_proj_weight'):
        weights = [kwargs[f'{role}_proj_weight'] for role in 'qkv']
    else:
        weights = in_proj_weight.chunk(3)
    projected = (nn.functional.linear(x, W) for x, W in zip((query, key, value), weights))
    return dict(zip('QKV', (x.unflatten(-1, (heads, -1)).movedim(-2, -3) for x in projected)))


def _first(node, wanted):
    """Return the operands of the last matching product that a node was computed from."""
    queue, seen = deque([node]), set()
    while queue:
        node = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            return wanted[node]
        queue.extend(parent for parent, _ in node.next_functions)
    return None


def _reaches(node, goal, barriers):
    """Return whether a node was computed from the goal without another product in between."""
    queue, seen = deque([node]), set()
    while queue:
        node = queue.popleft()
        if node is goal:
            return True
        if node is None or node in seen or node in barriers:
            continue
        seen.add(node)
        queue.extend(parent for parent, _ in node.next_functions)
    return False


def _cut(module, args, kwargs):
    """Detach a module's inputs from their graph, with some noise, because DETR's decoder starts with zeros."""

    def cut(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach() + 0.1 * torch.randn_like(x)

    return tree_map(cut, (args, kwargs))


def read(model: nn.Module, run) -> list[Event]:
    """Run a model, and return for each attention where its queries, keys and values come from.

    Args:
        model: in evaluation mode; its parameters are randomised where they are constant.
        run: runs the model.
    """
    # Only the product's own layer counts, not the layers before it.
    attention = [m for m in model.modules() if 'att' in type(m).__name__.lower() and m is not model]
    inside = {x for m in attention for x in m.modules()}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) and m not in inside]
    last = [*attention, *layers]
    hooks = [m.register_forward_pre_hook(_cut, with_kwargs=True) for m in last]
    parameters = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.is_floating_point()}
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    torch.manual_seed(0)
    with torch.enable_grad(), _Watch() as watch:
        run()
    for hook in hooks:
        hook.remove()
    events = []
    for tensors in [*watch.events, *watch.eager_events()]:
        event = Event()
        for role, tensor in tensors.items():
            event.rows[role] = _rows(tensor, parameters, model)
            heads = tensor.shape[-3] if tensor.ndim >= 4 else 0
            if 1 < heads <= 16:
                event.heads[role] = [_rows(tensor.select(-3, h), parameters, model) for h in range(heads)]
        events.append(event)
    return events


def _rows(tensor, parameters, model):
    """Return for each parameter the rows (columns of transformers' Conv1D) that a tensor comes from."""
    if tensor.grad_fn is None:
        return {}
    generator = torch.Generator().manual_seed(1)
    total = (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
    grads = torch.autograd.grad(total, list(parameters.values()), retain_graph=True, allow_unused=True)
    found = {}
    for name, grad in zip(parameters, grads):
        if grad is None or (grad.ndim > 2 and grad[0, 0].numel() > 1):  # no projection, but a spatial convolution
            continue
        if 'bias' in name:
            continue
        owner = model.get_submodule(name.rpartition('.')[0])
        grad = grad.flatten(1)
        grad = grad.T if type(owner).__name__ == 'Conv1D' else grad
        rows = grad.abs().amax(1).nonzero().flatten().tolist()
        if rows:
            found[name] = frozenset(rows)
    return found
