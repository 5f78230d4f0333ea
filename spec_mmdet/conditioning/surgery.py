"""Putting the corrections on a model that exists already, and taking them off again."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .projections import projections
from .spectra import Report, spectra


def condition(
    model: nn.Module,
    type: str = 'identity',
    lam: float | None = None,
    per_head: bool = False,
    keep_function: bool = False,
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

    Returns:
        What was conditioned, with the condition numbers; print it for a table.

    Raises:
        InputError: if the model has no projections that could be found, one of them is conditioned or parametrized
            already, or its heads are not known and ``per_head`` asks for them. The model is then unchanged.
        ValueError: on arguments that :class:`Correction` refuses.

    Warns:
        UserWarning: if the corrections make the condition number of a projection no better.
    """
    found = list(projections(model))
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
