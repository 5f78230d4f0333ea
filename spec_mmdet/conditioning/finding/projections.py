"""Finding the query, key and value projections in a model that exists already."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import InputError
from ..correction import Correction
from .coverage import uncovered
from .examples import Call, make_example, record_calls
from .names import NamedLayer, find_named_layers
from .probe import Finding, Heads, Layer, probe_layouts
from .rows import RowSelection, parse_layout, select_rows


@dataclass(frozen=True)
class Projection:
    """Query, key or value projections of one shape that an attention module holds in one weight.

    Attributes:
        name: where it is in the model, for instance 'blocks.0.attn.qkv'; followed by the roles, for instance [V], where
            the weight holds projections of other shapes beside these.
        rows: which projections they are, and which rows of the weight they take.
        attention: the attention module.
        module: the module that owns the weight: a linear layer, or the attention module itself.
        tensor: the weight's name in it.
    """

    name: str
    rows: RowSelection
    attention: nn.Module
    module: nn.Module
    tensor: str = 'weight'

    @property
    def roles(self) -> str:
        """Which projections they are: 'QKV', 'KV', 'Q', 'K' or 'V', for instance."""
        return self.rows.roles

    @property
    def heads(self) -> int | None:
        """How many heads each of the projections has, where that is known."""
        return self.rows.heads

    @property
    def correction(self) -> Correction | None:
        """What is added to the weight, if it is conditioned."""
        for correction in find_corrections(self.module, self.tensor):
            if correction.rows in (None, self.rows):
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

    def make_correction(
        self, type: str = 'identity', lam: float | None = None, sigmas: float | None = None, per_head: bool = False
    ) -> Correction:
        """Make the correction of these projections, for the weight as its module stores it.

        Raises:
            ValueError: on arguments that :class:`Correction` refuses.
        """
        return Correction(self.weight, type, lam, sigmas, per_head, rows=self.rows)

    @torch.no_grad()
    def replace(self, W: Tensor) -> None:
        """Put other values in the place of W, and leave the weight's other rows as they are."""
        weight, rows = self.weight, W.flatten(0, 1)
        taken = self.rows.put(torch.ones_like(rows), weight).bool()
        weight.copy_(self.rows.put(rows, weight).where(taken, weight))

    def _blocks(self, weight: Tensor) -> Tensor:
        return self.rows.take(weight).unflatten(0, (len(self.roles), -1))


def find_corrections(module: nn.Module, tensor: str) -> list[Correction]:
    """The corrections that parametrize a module's tensor."""
    if not parametrize.is_parametrized(module, tensor):
        return []
    return [part for part in module.parametrizations[tensor] if isinstance(part, Correction)]


@dataclass
class Found:
    """What attention a model has.

    Attributes:
        projections: those whose rows are known.
        refused: layers that hold projections, but whose rows could not be told, and what to do about it.
        uncovered: what looks like attention and has no layers that could be taken, and what it looks like.
    """

    projections: list[Projection]
    refused: dict[str, str]
    uncovered: dict[str, str]

    def require_complete(self) -> None:
        """Refuse a model of whose attention a part could not be taken.

        Raises:
            InputError: naming all of that part.
        """
        if self.refused:
            name, why = next(iter(self.refused.items()))
            others = f' ({len(self.refused) - 1} more like it)' if len(self.refused) > 1 else ''
            raise InputError(f'{name}: {why}, or partial=True to leave it as it is{others}')
        if self.uncovered:
            listed = '; '.join(f'{name} {why}' for name, why in self.uncovered.items())
            raise InputError(
                f'condition: {len(self.uncovered)} modules look like attention and would be left as they are: '
                f'{listed}. Pass partial=True to condition the {len(self.projections)} projections that were found'
            )


def find_projections(
    model: nn.Module, layout: dict[str, str] | None = None, example: object = None
) -> Iterator[Projection]:
    """The query, key and value projections of a model, as :func:`find` finds them.

    Raises:
        InputError: where it cannot be told which rows of a layer they are.
    """
    found = find(model, layout, example)
    for name, why in found.refused.items():
        raise InputError(f'{name}: {why}')
    yield from found.projections


def find(model: nn.Module, layout: dict[str, str] | None = None, example: object = None) -> Found:
    """Find the query, key and value projections in a model, and what looks like attention beside them.

    Layers are found by the names that attention modules give them. Which of their rows are queries, keys and values is
    taken from ``layout``, from what the module says of its heads, or from an experiment (:mod:`.probe`).

    Args:
        model: any; left as it is.
        layout: for layers by their name in the model, in which * stands for anything, the rows that they hold, as
            :func:`.rows.parse_layout` reads it.
        example: an input of the model, whose attention gets its own inputs from it in the experiment: a tensor, a
            tuple of arguments, or a dict of keyword arguments.

    Raises:
        InputError: if a layout cannot be read, does not fit its layer or names none.
    """
    layout = dict(layout or {})
    unused = set(layout)
    found = Found([], {}, {})
    taken: set[nn.Module] = set()
    known: dict[tuple, Finding | None] = {}
    calls = None if example is None else record_calls(model, example)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            taken.add(module)
            found.projections += _of_multihead_attention(name, module)
            continue
        for group in find_named_layers(module)[0]:
            taken.add(module)
            paths = [f'{name}.{layer.path}'.lstrip('.') for layer in group]
            stated = _stated(paths, group, layout, unused)
            selections = _conditioned(module, group) or stated or _by_attributes(module, group)
            others = [p for p, x in zip(paths, group) if not selections and parametrize.is_parametrized(x.module)]
            if others:
                found.refused[others[0]] = 'it has a parametrization of another kind already'
                continue
            if not selections:
                selections = _by_experiment(module, group, calls and calls.get(name), known)
            if not selections and calls is None:
                calls = _usual_calls(model)
                selections = _by_experiment(module, group, calls.get(name), known)
            if not selections:
                found.refused |= dict.fromkeys(paths, _unknown(paths, group))
                continue
            for path, layer, parts in zip(paths, group, selections):
                for rows in parts:
                    part = f'[{rows.roles}]' if len(parts) > 1 else ''
                    found.projections.append(Projection(path + part, rows, module, layer.module))
    if unused:
        raise InputError(f'layout: no layer is called {", ".join(sorted(unused))}')
    found.uncovered = uncovered(model, taken)
    return found


def _unknown(paths: list[str], group: list[NamedLayer]) -> str:
    rows = ', '.join(f'{path} ({layer.shape[0]} x {layer.shape[1]})' for path, layer in zip(paths, group))
    return (
        f'it could not be told which rows of {rows} are queries, keys and values. Pass layout= with the heads and rows '
        f"that they have, for instance {{'{_pattern(paths[0])}': '8q64 8k64 8v64'}} (see parse_layout in "
        'spec_mmdet.conditioning.rows), or example= with an input of the model'
    )


def _of_multihead_attention(name: str, module: nn.MultiheadAttention) -> Iterator[Projection]:
    if module._qkv_same_embed_dim:
        path = f'{name}.in_proj'.lstrip('.')
        yield Projection(path, RowSelection('QKV', module.num_heads), module, module, 'in_proj_weight')
        return
    for role in 'qkv':
        path = f'{name}.{role}_proj'.lstrip('.')
        yield Projection(path, RowSelection(role.upper(), module.num_heads), module, module, f'{role}_proj_weight')


def _pattern(path: str) -> str:
    """All layers called like this one, whatever block they are in."""
    return re.sub(r'(^|\.)\d+(?=\.)', r'\1*', path)


def _stated(paths: list[str], group: list[NamedLayer], layout: dict[str, str], unused: set[str]) -> list | None:
    """What the user says of these layers."""
    texts = [next((key for key in layout if fnmatch.fnmatchcase(path, key)), None) for path in paths]
    if not any(texts):
        return None
    unused -= set(texts)
    result = []
    for path, layer, key in zip(paths, group, texts):
        if key is None:
            raise InputError(f'layout: it says nothing of {path}, which belongs with {", ".join(paths)}')
        parsed = parse_layout(layout[key])
        roles, rows = {role for role, _ in parsed} - {'-'}, sum(count for _, count in parsed)
        if rows != layer.shape[0] or roles != set(layer.roles):
            raise InputError(
                f'layout: {path} has {layer.shape[0]} rows of {", ".join(layer.roles)}, but {layout[key]!r} are {rows} '
                f'of {", ".join(sorted(roles, key="QKV".index))}'
            )
        result.append(select_rows(parsed, layer.transposed))
    return result


def _conditioned(attention: nn.Module, group: list[NamedLayer]) -> list | None:
    """What the layers' corrections know."""
    own = getattr(attention, 'correction', None)
    whole = [RowSelection(layer.roles, _count(attention, _HEADS)) for layer in group]
    if isinstance(own, Correction):
        return [[rows] for rows in whole]
    result = [[c.rows or all_rows for c in find_corrections(x.module, 'weight')] for x, all_rows in zip(group, whole)]
    return result if all(result) else None


_HEADS = ('num_heads', 'num_attention_heads', 'heads', 'n_heads', 'n_head', 'nhead', 'num_query_heads')
_KEY_HEADS = ('num_key_value_heads', 'num_kv_heads', 'n_kv_heads', 'kv_heads')
_WIDTHS = (
    'head_dim',
    'attention_head_size',
    'head_size',
    'dim_head',
    'dim_per_head',
    'key_dim',
    'qk_head_dim',
    'd_head',
)


def _count(attention: nn.Module, names: tuple[str, ...]) -> int | None:
    """What the attention, or else its configuration, says under one of these names."""
    for holder in (attention, getattr(attention, 'config', None)):
        for name in names:
            if type(getattr(holder, name, None)) is int:
                return getattr(holder, name)
    return None


def _by_attributes(attention: nn.Module, group: list[NamedLayer]) -> list | None:
    """Layers that hold one projection each, where the heads that the attention says it has fit their rows."""
    if len(group) < 3:
        return None
    Q, K, V = (layer.shape[0] for layer in group)
    H, G = _count(attention, _HEADS), _count(attention, _KEY_HEADS)
    widths = [w for name in _WIDTHS if type(w := getattr(attention, name, None)) is int and w > 0]
    for d in [*widths, *([Q // H] if H else [])]:
        h, g = Q // d, K // d
        fits = h * d == Q and g * d == K and H in (None, h) and (G in (None, g) or Q == K)
        if fits and h % g == 0 and V % g == 0:
            return [[RowSelection(x.roles, n, None, x.transposed)] for x, n in zip(group, (h, g, g))]
    if Q == K:
        return [[RowSelection(layer.roles, None, None, layer.transposed)] for layer in group]
    return None


def _usual_calls(model: nn.Module) -> dict[str, Call]:
    example = make_example(model)
    try:
        return {} if example is None else record_calls(model, example)
    except InputError:  # it was but a guess
        return {}


def _by_experiment(attention: nn.Module, group: list[NamedLayer], call: Call | None, known: dict) -> list | None:
    heads = Heads(_count(attention, _HEADS), _count(attention, _KEY_HEADS))
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in attention.named_parameters())
    key = type(attention), heads, shapes  # the blocks of a model have the same attention
    if known.get(key) is None:
        layers = [Layer(f'{layer.path}.weight', layer.roles, *layer.shape, layer.transposed) for layer in group]
        known[key] = probe_layouts(attention, layers, heads, call)
    finding = known[key]
    if finding is None:
        return None
    result = [select_rows(layout, layer.transposed) for layout, layer in zip(finding.layouts, group)]
    # That there is one head is what was assumed where nothing is known.
    known_heads = finding.heads and (heads.queries or any(rows.heads > 1 for found in result for rows in found))
    return result if known_heads else [[replace(rows, heads=None) for rows in found] for found in result]
