"""Putting the corrections on a model that exists already, and taking them off again."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .projections import find, projections
from .spectra import Report, spectra


def condition(
    model: nn.Module,
    type: str = 'identity',
    lam: float | None = None,
    per_head: bool = False,
    keep_function: bool = False,
    layout: dict[str, str] | None = None,
    example: object = None,
    partial: bool = False,
) -> Report:
    """Condition the attention of a model that exists already: each query, key and value projection becomes W + C.

    The corrections are parametrizations (torch.nn.utils.parametrize): the modules' own code stays as it is, and the
    optimiser trains W alone, under the name ``<layer>.parametrizations.weight.original``. Make the optimiser after
    this call. Recognised are torch.nn.MultiheadAttention and the layers named as timm's and transformers' are.

    Weights trained without a correction compute something else with it. ``keep_function`` takes them over: W is
    replaced by W - C, so that W - C + C is what it was. The condition number of what the model computes with is then
    the old one too, for a start; only what training and weight decay do to it from there on differs.

    Args:
        model: changed in place.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5).
        lam: lambda of the identity form; 10 if not given, as in the paper.
        per_head: correct each head's rows as a matrix of their own, not each projection as a whole.
        keep_function: keep the function of weights that were trained without the correction.
        layout: which rows of a layer are queries, keys and values, where that cannot be found out: for layers by their
            name, in which * stands for anything, for instance ``{'blocks.*.attn.qkv': '2(q16 k16 v64)'}``; see
            :func:`~.rows.parse_layout`.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword arguments), for finding that
            out in attention that does not run on made-up inputs.
        partial: condition a part of the model's attention, where the rest could not be taken. The report lists it.

    Returns:
        What was conditioned, with the condition numbers; print it for a table.

    Raises:
        InputError: if the model has no projections that could be found, or not all of its attention could be taken and
            ``partial`` was not asked for; if one of them is conditioned or parametrized already or shares its weight
            with another layer, or its heads are not known and ``per_head`` asks for them. The model is then unchanged.
        ValueError: on arguments that :class:`Correction` refuses.

    Warns:
        UserWarning: if the corrections make the condition number of a projection no better.
    """
    attention = find(model, layout, example)
    if not partial:
        attention.require_whole()
    found = attention.projections
    if not found:
        raise InputError('condition: found no query, key and value projections in this model')
    corrections = []
    for projection in found:
        if projection.correction is not None:
            raise InputError(f'condition: {projection.name} is conditioned already; fold(model) takes that into W')
        if parametrize.is_parametrized(projection.module, projection.tensor):
            raise InputError(f'condition: {projection.name} has a parametrization of another kind already')
        if per_head and projection.heads is None:
            raise InputError(f'condition: {projection.name} does not say how many heads it has; leave out per_head')
        corrections.append(projection.make_correction(type, lam, per_head))
    for projection, correction in zip(found, corrections):
        parametrize.register_parametrization(projection.module, projection.tensor, correction)
    report = spectra(found)
    report.left_out = attention.refused | attention.overlooked
    if report.unhelpful():
        warnings.warn(report.unhelpful(), stacklevel=2)
    if keep_function:
        for projection, correction in zip(found, corrections):
            original = projection.module.parametrizations[projection.tensor].original
            original.data -= correction.correction(original)
    return report


def fold(model: nn.Module) -> None:
    """Replace every conditioned W by W + C and leave no trace of the correction: for inference and export.

    The output stays the same, the cost is that of plain attention, and the state dict is a plain model's.

    Args:
        model: changed in place; one without corrections is left as it is.
    """
    for projection in list(projections(model)):
        if projection.correction is None:
            continue
        if parametrize.is_parametrized(projection.module, projection.tensor):
            parametrize.remove_parametrizations(projection.module, projection.tensor)
        else:
            projection.weight.data = projection.correction(projection.weight.data)
            projection.attention.correction = None
