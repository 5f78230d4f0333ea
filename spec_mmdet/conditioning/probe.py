"""Finding out by experiment which rows of an attention module's layers are queries, keys and values.

Neither a layer's name nor its shape says in which order its rows are: ViT's qkv holds all of Q, then all of K, then all
of V, GPT-NeoX's holds them head by head. But whatever the order and whatever the attention, with K at zero its output
does not depend on Q, and with V at zero it depends on neither. So a copy of the module, with random weights and in
double precision, is run with a believed K (or V) at zero, and autograd tells on which rows its output depends. A belief
that puts but one row wrong shows a dependence where there should be none.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .rows import Layout, Stack

# Relative to the largest gradient, what counts as none. The zeros are exact but for sums taken in another order.
_NONE = 1e-9


@dataclass(frozen=True)
class Layer:
    """A layer of an attention module that holds projections: its weight's name there, its roles and its rows."""

    weight: str
    roles: str
    outputs: int
    inputs: int
    transposed: bool = False


@dataclass(frozen=True)
class Heads:
    """How many heads an attention module says it has, of queries and of keys and values; None where it does not."""

    queries: int | None
    keys: int | None


@dataclass(frozen=True)
class Finding:
    """The layout of each layer; whether the experiment bears out which rows are one head's."""

    layouts: tuple[Layout, ...]
    heads: bool


def find_out(attention: nn.Module, layers: list[Layer], heads: Heads, recorded: list | None = None) -> Finding | None:
    """Find the layouts of the layers that the attention's own behaviour bears out.

    Args:
        attention: left as it is; a copy is run.
        layers: those of one query, key and value.
        heads: what the module says of its heads.
        recorded: inputs that it got in its model, each as (args, kwargs); if None, some are made up.

    Returns:
        None where the module does not run alone on the inputs, or none of the layouts that were thought of holds.
    """
    beliefs = list(_beliefs(attention, layers, heads))
    try:
        copied = copy.deepcopy(attention)
        if any(parameter.is_meta for parameter in copied.parameters()):
            copied.to_empty(device='cpu')  # its values do not matter
    except Exception:  # a module may hold anything
        return None
    inputs = recorded if recorded is not None else _made_up_inputs(attention, layers)
    for args, kwargs in inputs:
        try:
            experiment = _Experiment(copied, layers, args, kwargs)
        except Exception:  # these are not the inputs that it takes
            continue
        without_heads = None
        for belief in beliefs:
            if experiment.bears_out(belief):
                if experiment.bears_out_heads(belief):
                    return Finding(belief, True)
                without_heads = without_heads or Finding(belief, False)
        return without_heads
    return None


class _Experiment:
    """A copy of an attention module, random and in double precision, whose projections can be put at zero."""

    def __init__(self, attention: nn.Module, layers: list[Layer], args: tuple, kwargs: dict) -> None:
        self.attention, self.layers = attention, layers
        attention.cpu().double()
        attention.eval()
        self.args, self.kwargs = args, kwargs
        generator = torch.Generator().manual_seed(0)
        self.parameters = {}
        for name, parameter in self.attention.named_parameters(remove_duplicate=False):
            value = torch.zeros_like(parameter)
            if parameter.ndim > 1:
                value.normal_(generator=generator).div_(math.sqrt(parameter[0].numel()))
            elif not name.endswith('bias'):
                value.uniform_(0.5, 1.5, generator=generator)
            self.parameters[name] = value
        for module in self.attention.modules():
            if hasattr(module, 'reset_running_stats'):
                module.reset_running_stats()
        # Two draws, because the values' own part shows only when the queries and keys change. A few columns do.
        self.rows, self.others = (
            [torch.randn(x.outputs, min(x.inputs, 8), generator=generator).double() / 8**0.5 for x in layers]
            for _ in range(2)
        )
        self.cotangent: Tensor | None = None
        self.plain = self._gradients(self.rows)
        self.largest = max(grad.abs().max().item() for grad in self.plain)
        # With all at zero softmax attention averages the values, so that on these alone the output depends.
        self.at_zero = self._differ(self._gradients([torch.zeros_like(x) for x in self.rows]))

    @torch.enable_grad()
    def _gradients(self, rows: list[Tensor]) -> list[Tensor]:
        """The gradient of a random sum of the output by each layer's rows, where these are what they hold."""
        leaves, parameters = [x.clone().requires_grad_() for x in rows], dict(self.parameters)
        for leaf, layer in zip(leaves, self.layers):
            rows = nn.functional.pad(leaf, (0, layer.inputs - leaf.shape[1]))
            stack = Stack(layer.roles, transposed=layer.transposed)
            parameters[layer.weight] = stack.put(rows, self.parameters[layer.weight])
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            out = torch.func.functional_call(self.attention, parameters, args, kwargs)
        out = next(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)
        if self.cotangent is None:
            self.cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        found = torch.autograd.grad((out * self.cotangent).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found)]

    def _depends(self, zero: list[Tensor]) -> Tensor:
        """For all layers' rows one after the other: does the output depend on them, with others at zero?"""
        rows = [x.masked_fill(at[:, None], 0) for x, at in zip(self.rows, zero)]
        return self._differ(self._gradients(rows))

    def _differ(self, gradients: list[Tensor]) -> Tensor:
        return torch.cat([grad.abs().amax(1) for grad in gradients]) > _NONE * self.largest

    def bears_out(self, belief: tuple[Layout, ...]) -> bool:
        """Whether the queries, keys and values are where they are believed to be."""
        role, _ = _spread(belief)
        whole, split = torch.cat(role), [role_ == 1 for role_ in role]
        Q, K, V, other = (whole == i for i in range(4))
        if not self._differ(self.plain)[~other].all():
            return False
        if self.at_zero.any() and not torch.equal(self.at_zero[~other], V[~other]):
            return False
        without_K = self._depends(split)
        if without_K[Q].any() or not without_K[V | other].all():
            return False
        without_V = self._depends([role_ == 2 for role_ in role])
        if without_V[Q | K].any():
            return False
        # The values take part through the attention's weights: rows that do not are another branch's.
        changed = [torch.where((x <= 1)[:, None], b, a) for x, a, b in zip(role, self.rows, self.others)]
        change = [after - before for after, before in zip(self._gradients(changed), self.plain)]
        return bool(self._differ(change)[V].all())

    def bears_out_heads(self, belief: tuple[Layout, ...]) -> bool:
        """Whether the rows of each believed head belong together, given that the roles are borne out."""
        role, head = _spread(belief)
        Q = torch.cat(role) == 0
        counts = [max(int(h[r == i].max()) + 1 for r, h in zip(role, head) if (r == i).any()) for i in range(3)]
        share = counts[0] // counts[1]
        of_query = torch.cat(head)[Q] // share
        # Of the heads of keys, those whose number has a certain bit are left: then those of the queries are, too.
        for bit in range((counts[1] - 1).bit_length()):
            expected = (of_query >> bit & 1) == 1
            of_keys, of_values = (
                self._depends([(r == i) & (h >> bit & 1 == 0) for r, h in zip(role, head)])[Q] for i in (1, 2)
            )
            # Where the heads' weights are mixed (CaiT's talking heads), all of them need any value.
            if not torch.equal(of_keys, expected) or not (of_values.all() or torch.equal(of_values, expected)):
                return False
        return True


def _spread(belief: tuple[Layout, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer's rows: the role's number in 'QKV-', and the number of the head."""
    role, head, seen = [], [], dict.fromkeys('QKV-', 0)
    for layout in belief:
        numbers = []
        for name, count in layout:
            numbers += [(('QKV-').index(name), seen[name])] * count
            seen[name] += 1
        role.append(torch.tensor([r for r, _ in numbers]))
        head.append(torch.tensor([h for _, h in numbers]))
    return role, head


def _beliefs(attention: nn.Module, layers: list[Layer], heads: Heads) -> Iterator[tuple[Layout, ...]]:
    """Layouts that the layers could have, the usual ones first."""
    seen = set()
    for sizes in _sizes(attention, layers, heads):
        options = [_orders(layer, sizes) for layer in layers]
        for belief in itertools.product(*options):
            if belief not in seen:
                seen.add(belief)
                yield belief


# Of each role, the number of heads and the rows of one.
Sizes = dict[str, tuple[int, int]]


def _sizes(attention: nn.Module, layers: list[Layer], heads: Heads) -> Iterator[Sizes]:
    """Numbers and sizes of heads that the attention could have, from what it says in its attributes."""
    outputs = sum(layer.outputs for layer in layers)
    numbers = sorted({x for x in vars(attention).values() if type(x) is int and 0 < x <= outputs})
    H = heads.queries or 1
    for G in dict.fromkeys([heads.keys or H, H, 1]):
        if H % G:
            continue
        widths = dict.fromkeys([outputs // (H + 2 * G), *(n for x in numbers for n in (x, x // H, x // G) if n)])
        for d in widths:
            for v in dict.fromkeys([d, (outputs - (H + G) * d) // G, *widths]):
                if v > 0:
                    yield {'Q': (H, d), 'K': (G, d), 'V': (G, v)}
    n = (outputs - 1) // 2
    yield {'Q': (1, 1), 'K': (1, n), 'V': (1, n)}  # MobileViT-v2's separable attention has one query, of one row


def _orders(layer: Layer, sizes: Sizes) -> list[Layout]:
    """The orders in which a layer could hold its projections' heads: role by role, head by head, and in between."""
    counts = [sizes[role][0] for role in layer.roles]
    rest = layer.outputs - sum(sizes[role][0] * sizes[role][1] for role in layer.roles)
    # The rows that are left over are a gate's, which are known beside queries alone.
    if rest < 0 or rest and (layer.roles != 'Q' or rest % counts[0]):
        return []
    orders = []
    common = math.gcd(*counts)
    for groups in (n for n in range(1, common + 1) if common % n == 0):
        parts = [((role, sizes[role][1]),) * (sizes[role][0] // groups) for role in layer.roles]
        parts += [(('-', rest // groups),)] if rest else []
        for order in itertools.permutations(parts):
            names = [part[0][0] for part in order]
            # Queries and keys are told apart by convention alone: queries come first.
            if 'Q' not in names or 'K' not in names or names.index('Q') < names.index('K'):
                orders.append(sum(order, ()) * groups)
    return orders


# Arguments that attention modules ask for, beside tokens, and what says nothing in their place.
_WITHOUT = re.compile(r'mask|bias|past|cache|layer_idx|output_attentions|head_|dropout|use_|rel_pos|position_ids|freqs')
_OTHER_TOKENS = re.compile(r'key|value|kv|context|encoder|memory|residual|^y$|hidden_states|query')


def _made_up_inputs(attention: nn.Module, layers: list[Layer]) -> Iterator[tuple[tuple, dict]]:
    """Inputs that a module of this kind could take: random tokens in several shapes, with what else it asks for."""
    generator = torch.Generator().manual_seed(2)
    width = layers[0].inputs
    try:
        first, *others = inspect.signature(attention.forward).parameters.values()
    except (TypeError, ValueError):
        return
    required = [p for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for h, w in _grids(attention):
        N = h * w
        for shape in ((2, N, width), (2, width, h, w), (2, h, w, width), (N, width)):
            for rotary in _rotary_widths(attention) if any('position_emb' in p.name for p in others) else [None]:
                kwargs = {}
                for p in others:
                    if p.name == 'position_embeddings':
                        batch = shape[:-2] and (1,)
                        kwargs[p.name] = torch.ones(*batch, N, rotary), torch.zeros(*batch, N, rotary)
                    elif p not in required:
                        continue
                    elif re.search('seqlens', p.name):
                        kwargs[p.name] = torch.tensor([0, N], dtype=torch.int32)
                    elif p.name == 'alibi':
                        kwargs[p.name] = torch.zeros(2, 1, 1, N)
                    elif p.name in ('H', 'W', 'height', 'width'):
                        kwargs[p.name] = h if p.name[0].lower() == 'h' else w
                    elif re.search('size|shape|^hw$', p.name):
                        kwargs[p.name] = (h, w)
                    elif _OTHER_TOKENS.search(p.name):
                        kwargs[p.name] = torch.randn(shape, generator=generator)
                    else:
                        kwargs[p.name] = None
                kwargs = {k: _as_double(v) for k, v in kwargs.items()}
                yield (torch.randn(shape, generator=generator, dtype=torch.float64),), kwargs


def _as_double(value):
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _grids(attention: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths of tokens: what the module is made for, where it says so, or a few of its own choice."""
    found = []
    for name, value in vars(attention).items():
        if re.search('window|resolution|feat_size|input_size|patch|grid|seq', name):
            value = (value, value) if type(value) is int else value
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(x) is int and x > 0 for x in value):
                found.append(tuple(value))
    yield from dict.fromkeys([*found, (3, 3), (4, 4)])


def _rotary_widths(attention: nn.Module) -> list[int]:
    """The widths that rotary position embeddings could have."""
    numbers = {x for x in vars(attention).values() if type(x) is int and x > 1}
    return sorted({n for x in numbers for n in (x, x // 2, x // 4) if 1 < n <= 512}, reverse=True)
