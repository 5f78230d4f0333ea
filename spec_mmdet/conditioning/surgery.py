"""Add corrections to the attention of an existing model, and fold them into its weights."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.utils import parametrize

from ..errors import InputError
from .correction import Correction, compute_sigma_max
from .effects import is_trained
from .finding.projections import Projection, find, find_projections
from .fixed import Corrected, Corrections
from .initialisation import initialise_conditioned
from .spectra import Report
from .verification import Changes, change_and_verify, find_obstacle, find_shared_memory, reject_wrapped_model


def condition(
    model: nn.Module,
    type: str = 'identity',
    lam: float | None = None,
    sigmas: float | None = None,
    per_head: bool = False,
    keep_function: bool = False,
    layout: dict[str, str] | None = None,
    example: object = None,
    partial: bool = False,
) -> Report:
    """Condition the attention of an existing model: each query, key and value projection becomes W + C.

    The weights themselves become W + C, so parameter names and modules are unchanged. Only the optimiser needs C,
    because its weight decay would pull W + C towards 0:

        report = condition(model)
        optimizer = torch.optim.AdamW(model.parameters(), ...)
        report.corrections.keep_fixed(optimizer)

    torch.nn.MultiheadAttention and layers with the names of timm and transformers are recognised. After the change the
    output of each layer, and of the model on the example, must be the one that W + C predicts.

    Args:
        model: changed in place.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5), fixed corrections; or 'initialisation', their authors'
            later method (arXiv 2609.07086), which replaces W and has no C: see
            :func:`~.initialisation.initialise_conditioned`.
        lam, sigmas, per_head: as for :class:`~.correction.Correction`; sigma_max is that of the present weights.
            The paper can be read as per head, and its authors apply C so in their next paper.
        keep_function: leave the weights as they are and treat them as W + C: to keep the function of weights that were
            trained without a correction, or to resume a training (then also load the corrections' state dict). C then
            only changes the target of weight decay.
        layout: rows of layers that are queries, keys and values, by name, where * matches anything, for instance
            ``{'blocks.*.attn.qkv': '2(q16 k16 v64)'}``; see :func:`~.finding.rows.parse_layout`.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword arguments). Without one, an
            input is made for models that state theirs; for others, the parts run on random tokens.
        partial: condition the model even if a part of its attention cannot be. The report lists that part.

    Returns:
        A report of the conditioned projections; print it for warnings and condition numbers.

    Raises:
        InputError: if no projections are found; if, without ``partial``, a part of the attention cannot be conditioned,
            because its rows are unknown, or its weights are conditioned already, recomputed, shared, on the meta
            device, quantised, expanded or not finite; if the model is sharded or has adapters; or if its output does
            not change as W + C predicts. All weights are then unchanged.
        ValueError: on arguments that :class:`~.correction.Correction` refuses, or that 'initialisation' does not have.

    Warns:
        UserWarning: if lambda is not above sigma_max of a projection, and if the weights have been trained and now
            compute something else.
    """
    if type == 'initialisation' and (lam is not None or sigmas is not None or per_head or keep_function):
        raise ValueError("conditioning: 'initialisation' has no lam, sigmas, per_head or keep_function")
    reject_wrapped_model(model)
    attention = find(model, layout, example)
    shared, found = find_shared_memory(model, attention.projections), []
    for projection in attention.projections:
        name = projection.name
        reason = find_obstacle(projection, keep_function) or shared.get(name)
        if not reason and (per_head or type == 'initialisation') and projection.heads is None:
            reason = 'has an unknown number of heads; pass layout= or example='
        if not reason:
            found.append(projection)
        elif not partial:
            raise InputError(f'condition: {name} {reason}')
        else:
            attention.refused[name] = reason
    if not partial:
        attention.require_complete()
    if not found:
        raise InputError('condition: found no query, key and value projections in this model. Name them with layout=')
    corrections = Corrections()
    changes: Changes = {}
    for projection in found:
        owner = projection.module, projection.tensor
        weight = changes.get(owner, projection.weight.detach())
        if type == 'initialisation':
            W = initialise_conditioned(projection.W, projection.roles, projection.heads)
            changes[owner] = projection.insert(W, weight)
        else:
            correction = Correction(projection.weight, type, lam, sigmas, per_head, rows=projection.rows)
            corrections[projection.name] = corrected = Corrected(*owner, correction)
            changes[owner] = weight + corrected.C
    report = Report(found, corrections, by_head=type == 'initialisation')
    report.left_out = attention.refused | attention.uncovered
    if not keep_function:
        warned = _warn_if_small(found, corrections) if type == 'identity' else []
        change_and_verify(changes, attention.runs)
        report.notes = [*_warn_if_trained(model), *warned]
    if corrections:
        for module, tensor in changes:  # so that a second call can be refused
            module.conditioned_tensors = {*getattr(module, 'conditioned_tensors', ()), tensor}
        report.notes.append('the weights are W + C now; corrections.keep_fixed(optimizer) keeps C out of weight decay')
    return report


def _warn_if_trained(model: nn.Module) -> list[str]:
    """Warn that trained weights compute something else with C."""
    trained = is_trained(model)
    if trained is False:
        return []
    note = (
        'these weights have been trained, and adding C has changed the output of the model'
        if trained
        else 'adding C has changed the output of the model. It is unknown whether the weights have been trained (no '
        'trainable normalisation layer)'
    )
    note += '. To keep the output, pass keep_function=True'
    if trained:
        warnings.warn(note, stacklevel=3)
    return [note]


def _warn_if_small(found: list[Projection], corrections: Corrections) -> list[str]:
    """Warn of matrices with sigma_max >= lambda, for which Theorem 3.8 gives no guarantee."""
    small, total = [], 0
    for projection in found:
        correction = corrections[projection.name].correction
        sigma_max = compute_sigma_max(projection.W.flatten(0, 1).unflatten(0, correction.split))
        lam = correction.lam.cpu().expand_as(sigma_max)
        small += [(projection.name, *pair) for pair in zip(lam[sigma_max >= lam], sigma_max[sigma_max >= lam])]
        total += sigma_max.numel()
    if not small:
        return []
    name, lam, sigma_max = small[0]
    note = (
        f'lam is not above sigma_max of {len(small)} of {total} matrices, whose condition numbers can become worse. '
        f'For instance {name}: lam = {lam:g}, sigma_max = {sigma_max:.3g}. Use a larger lam, or sigmas=2'
    )
    warnings.warn(note, stacklevel=3)
    return [note]


def fold(model: nn.Module) -> None:
    """Replace every W by W + C and drop the corrections, for inference and export.

    This applies to SpecXCiT's attention and to weights with a :class:`~.correction.Correction` as parametrization. The
    output stays the same, the cost is that of plain attention, and the state dict that of a plain model. Models that
    :func:`condition` has changed store W + C already.
    """
    for projection in list(find_projections(model)):
        if projection.correction is None:
            continue
        if parametrize.is_parametrized(projection.module, projection.tensor):
            parametrize.remove_parametrizations(projection.module, projection.tensor)
        else:
            projection.weight.data = projection.correction(projection.weight.data)
            projection.attention.correction = None
