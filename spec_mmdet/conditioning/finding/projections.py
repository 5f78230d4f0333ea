"""Find the query, key and value projections in an existing model."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import InputError
from ..correction import Correction
from .coverage import find_uncovered
from .layouts import count_heads, find_template, fit_separate_layers, fit_template
from .names import NamedLayer, find_fault, find_named_layers
from .probe import probe_layouts
from .rows import Layout, RowSelection, parse_layout, select_rows
from .running import Call, Run, find_runs, make_example, record_calls, use_evaluation_mode


@dataclass(frozen=True)
class Projection:
    """Query, key or value projections of one shape that an attention module holds in one weight."""

    name: str  # 'blocks.0.attn.qkv'; followed by the roles, such as [V], if the weight also holds other shapes
    rows: RowSelection  # their roles, and their rows in the weight
    attention: nn.Module
    module: nn.Module  # the owner of the weight: a linear layer, or the attention module itself
    tensor: str = 'weight'  # the weight's name in it

    @property
    def roles(self) -> str:
        """The projections, for instance 'QKV' or 'V'."""
        return self.rows.roles

    @property
    def heads(self) -> int | None:
        """Number of heads of each projection; None if unknown."""
        return self.rows.heads

    @property
    def correction(self) -> Correction | None:
        """The correction that the module adds to this weight, if any."""
        for correction in find_corrections(self.module, self.tensor):
            if correction.rows in (None, self.rows):
                return correction
        correction = getattr(self.attention, 'correction', None)
        return correction if isinstance(correction, Correction) else None

    @property
    def weight(self) -> Tensor:
        """The trained weight without its correction, as its module stores it."""
        if find_corrections(self.module, self.tensor):
            return self.module.parametrizations[self.tensor].original
        return getattr(self.module, self.tensor)

    @property
    def W(self) -> Tensor:
        """The trained weight, without its correction, shape (projections, D, k), in torch's layout (rows: outputs)."""
        return self._blocks(self.weight.detach())

    @property
    def W_plus_C(self) -> Tensor | None:
        """W + C, in the shape of W; None without a correction."""
        return None if self.correction is None else self._blocks(self.correction(self.weight.detach()))

    def insert(self, W: Tensor, weight: Tensor) -> Tensor:
        """Return a copy of a weight in which these projections have the values W."""
        rows = W.flatten(0, 1)
        taken = self.rows.put(torch.ones_like(rows), weight).bool()
        return self.rows.put(rows, weight).where(taken, weight)

    def _blocks(self, weight: Tensor) -> Tensor:
        return self.rows.take(weight).unflatten(0, (len(self.roles), -1))


def find_corrections(module: nn.Module, tensor: str) -> list[Correction]:
    """Find the corrections that parametrize a module's tensor."""
    if not parametrize.is_parametrized(module, tensor):
        return []
    return [part for part in module.parametrizations[tensor] if isinstance(part, Correction)]


@dataclass
class Found:
    """The attention of a model."""

    projections: list[Projection]  # with known rows
    refused: dict[str, str]  # layers with projections of unknown rows, with the reason and the remedy
    uncovered: dict[str, str]  # modules that look like attention but have no known projections, with the reason
    runs: list[Run] = field(default_factory=list)  # calls that run the model or its parts

    def require_complete(self) -> None:
        """Raise an InputError that names a part of the attention that cannot be conditioned, if there is one."""
        if self.refused:
            name, why = next(iter(self.refused.items()))
            others = f' ({len(self.refused) - 1} other layers are affected, too)' if len(self.refused) > 1 else ''
            raise InputError(f'condition: {name} {why}. To leave it unconditioned, pass partial=True{others}')
        if self.uncovered:
            listed = '; '.join(f'{name} {why}' for name, why in self.uncovered.items())
            raise InputError(
                f'condition: {len(self.uncovered)} modules look like attention and would stay unconditioned: '
                f'{listed}. Pass partial=True to condition the {len(self.projections)} projections that were found'
            )


def find_projections(
    model: nn.Module, layout: dict[str, str] | None = None, example: object = None
) -> Iterator[Projection]:
    """Yield the projections that :func:`find` finds; raise an InputError if the rows of a layer are unknown."""
    found = find(model, layout, example, coverage=False)
    for name, why in found.refused.items():
        raise InputError(f'{name} {why}')
    yield from found.projections


def find(
    model: nn.Module, layout: dict[str, str] | None = None, example: object = None, coverage: bool = True
) -> Found:
    """Find the query, key and value projections in a model, and the attention that has none.

    Layers are found by the names that attention modules give them. Their rows are taken from ``layout``, from existing
    corrections, from the table of known classes, from the numbers of heads for separate layers, or else from an
    experiment (:mod:`.probe`).

    Args:
        layout, example: as for :func:`~..surgery.condition`.
        coverage: also look for attention without projections, by running the model.

    Raises:
        InputError: if a layout is invalid, does not fit its layer or matches none, or the model does not run.
    """
    with use_evaluation_mode(model):  # spectral_norm changes its state when a weight is read in training mode
        return _Search(model, dict(layout or {}), example).run(coverage)


class _Search:
    """The search for the projections of one model."""

    def __init__(self, model: nn.Module, layout: dict[str, str], example: object) -> None:
        self.model, self.layout, self.example = model, layout, example
        self.unused = set(layout)
        self.probed: dict[tuple, object] = {}

    def run(self, coverage: bool) -> Found:
        # First, because a run can change the model: BigBird exchanges its attention modules on short inputs.
        found = Found([], {}, {}, find_runs(self.model, self.example) if coverage else [])
        attention: set[nn.Module] = set()
        for name, module in self.model.named_modules():
            for group in find_named_layers(module)[0]:
                attention.add(module)
                paths = [f'{name}.{layer.path}'.lstrip('.') for layer in group]
                selections = self.select(name, module, paths, group)
                if isinstance(selections, str):
                    found.refused |= dict.fromkeys(paths, selections)
                    continue
                for path, layer, parts in zip(paths, group, selections):
                    for rows in parts:
                        part = f'[{rows.roles}]' if len(parts) > 1 else ''
                        found.projections.append(Projection(path + part, rows, module, layer.module, layer.tensor))
        if self.unused:
            raise InputError(f'layout: no projection is named {", ".join(sorted(self.unused))}. Correct the name')
        if coverage:
            found.uncovered = find_uncovered(self.model, attention, found.runs)
        return found

    def select(
        self, name: str, module: nn.Module, paths: list[str], group: list[NamedLayer]
    ) -> list[list[RowSelection]] | str:
        """The rows of each layer of a group, or the reason why they are unknown."""
        stated = self.apply_layout(paths, group)
        selections = _read_corrections(module, group) or stated
        if selections:
            return selections
        faults = [find_fault(layer.module, layer.tensor) for layer in group]
        if any(faults):
            return next(filter(None, faults))
        template = find_template(module)
        layouts = next(fit_template(template, module, group), None) if template else None
        if layouts:
            return _select(module, layouts, group)
        return fit_separate_layers(module, group) or self.probe(name, module, group) or _describe_unknown(paths, group)

    def apply_layout(self, paths: list[str], group: list[NamedLayer]) -> list[list[RowSelection]] | None:
        """The rows that the user's layouts give these layers."""
        keys = [next((key for key in self.layout if fnmatch.fnmatchcase(path, key)), None) for path in paths]
        if not any(keys):
            return None
        self.unused -= set(keys)
        selections = []
        for path, layer, key in zip(paths, group, keys):
            if key is None:
                raise InputError(f'layout: add {path}, which belongs to the same attention as {", ".join(paths)}')
            parsed = parse_layout(self.layout[key])
            roles, rows = {role for role, _ in parsed} - {'-'}, sum(count for _, count in parsed)
            if rows != layer.shape[0] or roles != set(layer.roles):
                raise InputError(
                    f'layout: {path} has {layer.shape[0]} rows for {", ".join(layer.roles)}; the layout '
                    f'{self.layout[key]!r} describes {rows} rows for {", ".join(sorted(roles, key="QKV".index))}. '
                    'Correct the layout'
                )
            selections.append(select_rows(parsed, layer.transposed))
        return selections

    def probe(self, name: str, module: nn.Module, group: list[NamedLayer]) -> list[list[RowSelection]] | None:
        """The rows that an experiment shows, on the example or else on random tokens, then on an input made for it."""
        shapes = tuple((key, tuple(parameter.shape)) for key, parameter in module.named_parameters())
        key = type(module), count_heads(module), shapes  # the blocks of a model have the same attention
        if self.probed.get(key) is None:
            call = self.calls.get(name) if self.example is not None else None
            self.probed[key] = probe_layouts(module, group, call)
            if self.probed[key] is None and call is None and name in self.calls:
                self.probed[key] = probe_layouts(module, group, self.calls[name])
        if self.probed[key] is None:
            return None
        layouts, heads_confirmed = self.probed[key]
        return _select(module, layouts, group, heads_confirmed)

    @cached_property
    def calls(self) -> dict[str, Call]:
        """The arguments of the attention modules when the model is run on the example, or on one made for it."""
        if self.example is not None:
            return record_calls(self.model, self.example)
        made = make_example(self.model)
        with suppress(InputError):
            return {} if made is None else record_calls(self.model, made)
        return {}


def _read_corrections(attention: nn.Module, group: list[NamedLayer]) -> list[list[RowSelection]] | None:
    """The rows recorded in the layers' corrections."""
    whole = [RowSelection(layer.roles, count_heads(attention)) for layer in group]
    if isinstance(getattr(attention, 'correction', None), Correction):
        return [[rows] for rows in whole]
    recorded = [
        [correction.rows or rows for correction in find_corrections(layer.module, layer.tensor)]
        for layer, rows in zip(group, whole)
    ]
    return recorded if all(recorded) else None


def _select(
    attention: nn.Module, layouts: tuple[Layout, ...], group: list[NamedLayer], heads_known: bool = True
) -> list[list[RowSelection]]:
    selections = [select_rows(layout, layer.transposed) for layout, layer in zip(layouts, group)]
    # A single head is only an assumption if the module states no number of heads.
    if heads_known and (count_heads(attention) or any(rows.heads > 1 for parts in selections for rows in parts)):
        return selections
    return [[replace(rows, heads=None) for rows in parts] for parts in selections]


def _describe_unknown(paths: list[str], group: list[NamedLayer]) -> str:
    rows = ', '.join(f'{path} ({layer.shape[0]} x {layer.shape[1]})' for path, layer in zip(paths, group))
    pattern = re.sub(r'(^|\.)\d+(?=\.)', r'\1*', paths[0])  # the same layer in all blocks
    return (
        f'has query, key and value rows in an unknown order: {rows}. Pass layout= with the heads and rows of each, '
        f"for instance {{'{pattern}': '8q64 8k64 8v64'}} (see parse_layout in "
        'spec_mmdet.conditioning.finding.rows), or example= with an input of the model'
    )
