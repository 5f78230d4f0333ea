"""Finding out by experiment which rows of an attention module's layers are queries, keys and values.

Neither a layer's name nor its shape says in which order its rows are: ViT's qkv holds all of Q, then all of K, then all
of V, GPT-NeoX's holds them head by head. But whatever the order and whatever the attention, with K at zero its output
does not depend on Q, and with V at zero it depends on neither. So a copy of the module, with random weights and in
double precision, is run with an assumed K (or V) at zero, and autograd shows on which rows its output depends. A
candidate that puts but one row wrong shows a dependence where there should be none.
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

from .examples import Call
from .rows import Layout, RowSelection

_POSITIONS = re.compile('rel_|_rel|pos')

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


def probe_layouts(attention: nn.Module, layers: list[Layer], heads: Heads, call: Call | None = None) -> Finding | None:
    """Find the layouts of the layers that the attention's own behaviour bears out.

    Args:
        attention: left as it is; a copy is run.
        layers: those of one query, key and value.
        heads: what the module says of its heads.
        call: what it got in its model, in double precision; if None, some inputs are made up.

    Returns:
        None where the module does not run alone on the inputs, or none of the layouts that were thought of holds.
    """
    candidates = list(itertools.islice(_beliefs(attention, layers, heads), 200))
    try:
        copied = copy.deepcopy(attention)
        if any(parameter.is_meta for parameter in copied.parameters()):
            copied.to_empty(device='cpu')  # its values do not matter
        experiment = _Experiment(copied, layers)
    except Exception:  # a module may hold anything
        return None
    for inputs in [_with_random_tokens(call, layers)] if call else _made_up_calls(attention, layers):
        try:
            experiment.begin(inputs)
        except Exception:  # these are not the inputs that it takes
            continue
        without_heads = None
        for candidate in candidates:
            if experiment.confirms(candidate):
                layouts = candidate
                if not experiment.at_zero.any():
                    layouts = tuple(_in_the_order_of_its_name(*pair) for pair in zip(candidate, layers))
                if experiment.confirms_heads(candidate):
                    return Finding(layouts, True)
                without_heads = without_heads or Finding(layouts, False)
        return without_heads
    return None


class _Experiment:
    """A copy of an attention module, random and in double precision, whose projections can be put at zero."""

    def __init__(self, attention: nn.Module, layers: list[Layer]) -> None:
        self.attention, self.layers = attention, layers
        attention.cpu().double()
        attention.eval()
        generator = torch.Generator().manual_seed(0)
        self.parameters = {}
        for name, parameter in self.attention.named_parameters(remove_duplicate=False):
            value = torch.zeros_like(parameter)
            if parameter.ndim > 1 and _POSITIONS.search(name):
                pass  # relative positions can be keys of their own
            elif parameter.ndim > 1:
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

    def begin(self, call: Call) -> None:
        """Try these inputs from here on: whatever the module raises on them is raised."""
        self.args, self.kwargs = call
        self.cotangent: Tensor | None = None
        self.signs = [1]
        self.largest = max(grad.abs().max().item() for grad in self._gradients(self.rows))
        if not self._depends().all():
            self.signs = [1, -1]  # a ReLU behind the attention may have left nothing of some values
        self.matters = self._depends()
        # With all at zero softmax attention averages the values, so that on these alone the output depends.
        self.at_zero = self._differ(self._gradients([torch.zeros_like(x) for x in self.rows]))

    @torch.enable_grad()
    def _gradients(self, rows: list[Tensor]) -> list[Tensor]:
        """The gradient of a random sum of the output by each layer's rows, where these are what they hold."""
        leaves, parameters = [x.clone().requires_grad_() for x in rows], dict(self.parameters)
        for leaf, layer in zip(leaves, self.layers):
            rows = nn.functional.pad(leaf, (0, layer.inputs - leaf.shape[1]))
            stack = RowSelection(layer.roles, transposed=layer.transposed)
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

    def _depends(self, zero: list[Tensor] | None = None, change: list[Tensor] | None = None) -> Tensor:
        """For all layers' rows one after the other: does the output depend on them?

        Args:
            zero: for each layer, which rows are put at zero.
            change: for each layer, which rows are put at other values; asked for is then whether that changes how the
                output depends on them.
        """
        found = torch.zeros(sum(len(rows) for rows in self.rows), dtype=torch.bool)
        for sign in self.signs:
            rows = [sign * x for x in self.rows]
            if zero is not None:
                rows = [x.masked_fill(at[:, None], 0) for x, at in zip(rows, zero)]
            gradients = self._gradients(rows)
            if change is not None:
                rows = [torch.where(at[:, None], other, x) for x, other, at in zip(rows, self.others, change)]
                gradients = [after - before for after, before in zip(self._gradients(rows), gradients)]
            found |= self._differ(gradients)
        return found

    def _differ(self, gradients: list[Tensor]) -> Tensor:
        return torch.cat([grad.abs().amax(1) for grad in gradients]) > _NONE * self.largest

    def confirms(self, candidate: tuple[Layout, ...]) -> bool:
        """Whether the queries, keys and values are where they are assumed to be."""
        role, _ = _spread(candidate)
        whole, split = torch.cat(role), [role_ == 1 for role_ in role]
        Q, K, V, other = (whole == i for i in range(4))
        if not self.matters[~other].all():
            return False
        if self.at_zero.any() and not torch.equal(self.at_zero[~other], V[~other]):
            return False
        without_K = self._depends(split)
        if without_K[Q].any() or not without_K[other].all():
            return False
        without_V = self._depends([role_ == 2 for role_ in role])
        if without_V[Q | K].any():
            return False
        # The values take part through the attention's weights: rows that do not are another branch's.
        return bool(self._depends(change=[x <= 1 for x in role])[V].all())

    def confirms_heads(self, candidate: tuple[Layout, ...]) -> bool:
        """Whether the rows of each assumed head belong together, given that the roles are borne out."""
        role, head = _spread(candidate)
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


def _spread(candidate: tuple[Layout, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer's rows: the role's number in 'QKV-', and the number of the head."""
    role, head, seen = [], [], dict.fromkeys('QKV-', 0)
    for layout in candidate:
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
        for candidate in itertools.product(*options):
            if candidate not in seen:
                seen.add(candidate)
                yield candidate


def _in_the_order_of_its_name(layout: Layout, layer: Layer) -> Layout:
    """The roles as the name has them, where none of the three stands out as the values: in linear attention."""
    blocks = [(role, list(group)) for role, group in itertools.groupby(layout, key=lambda block: block[0])]
    if len(blocks) == len(layer.roles) and len({tuple(size for _, size in group) for _, group in blocks}) == 1:
        return tuple((role, size) for role, (_, group) in zip(layer.roles, blocks) for _, size in group)
    return layout


# Of each role, the number of heads and the rows of one.
Sizes = dict[str, tuple[int, int]]


def _sizes(attention: nn.Module, layers: list[Layer], heads: Heads) -> Iterator[Sizes]:
    """Numbers and sizes of heads that the attention could have, from what it says in its attributes."""
    outputs = sum(layer.outputs for layer in layers)
    numbers = sorted({x for x in vars(attention).values() if type(x) is int and 0 < x <= outputs})
    said = [heads.queries] if heads.queries else [1, *(outputs // (3 * n) for n in numbers if outputs % (3 * n) == 0)]
    for H, G in dict.fromkeys((h, g) for h in said for g in (heads.keys or h, h, 1)):
        if H % G:
            continue
        alone = [x.outputs // {'Q': H, 'K': G, 'V': G}[x.roles] for x in layers if len(x.roles) == 1]
        said_widths = [n for x in numbers for n in (x, x // H, x // G)]
        widths = [n for n in dict.fromkeys([outputs // (H + 2 * G), *alone, *said_widths]) if n]
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
    # The rows that are left over are a gate's, one for each row or each head of queries.
    if rest < 0 or rest and (layer.roles != 'Q' or rest not in (counts[0], layer.outputs // 2)):
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


def _made_up_calls(attention: nn.Module, layers: list[Layer]) -> Iterator[Call]:
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


def _with_random_tokens(call: Call, layers: list[Layer]) -> Call:
    """A recorded call with other tokens: a fresh model's can be so alike or so small that nothing shows."""
    generator = torch.Generator().manual_seed(2)
    widths = {layer.inputs for layer in layers}

    def other(x: object) -> object:
        tokens = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 and widths & {x.shape[-1], x.shape[1]}
        return torch.randn(x.shape, generator=generator).to(x) if tokens else x

    args, kwargs = call
    return tree_map(other, args), {k: v if 'position' in k else tree_map(other, v) for k, v in kwargs.items()}


def _as_double(value):
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def _grids(attention: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths of tokens: what the module is made for, where it says so, or a few of its own choice."""
    found = []
    for name, value in vars(attention).items():
        if re.search('window|resolution|feat_size|input_size|patch|grid', name):
            value = (value, value) if type(value) is int else value
            if isinstance(value, (tuple, list)) and len(value) == 2 and all(type(x) is int and x > 0 for x in value):
                found.append(tuple(value))
    for _, tensor in itertools.chain(attention.named_buffers(), attention.named_parameters()):
        side = math.isqrt(tensor.shape[-1]) if tensor.ndim > 1 else 0
        if side > 1 and tensor.shape[-1] == tensor.shape[-2] == side**2:  # a bias between all pairs of tokens
            found.append((side, side))
    small = [(h, w) for h, w in found if h * w <= 1024]
    yield from dict.fromkeys([*small, (3, 3), (4, 4)])


def _rotary_widths(attention: nn.Module) -> list[int]:
    """The widths that rotary position embeddings could have."""
    said = {x for name, x in vars(attention).items() if type(x) is int and re.search('head_|rot|rope', name)}
    return sorted({n for x in said for n in (x, x // 2, x // 4) if 1 < n <= 512}, reverse=True)[:8]
