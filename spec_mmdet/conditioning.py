"""Spectral conditioning: fixed corrections that make attention's Jacobian well conditioned.

The method of Saratchandran & Lucey, "Spectral Conditioning of Attention" (arXiv 2603.07162). Attention is given a
fixed correction C on each of its projections,

    SpecA(X) = softmax(X (W_Q + C_Q) (W_K + C_K)^T X^T) X (W_V + C_V),

because the condition number of its Jacobian is bounded by those of the projections, kappa(W) = sigma_max / sigma_min.
C is set once, gets no gradient and no weight decay; W goes on training. This module needs torch alone.

:func:`condition` puts the method on attention that exists already, :func:`fold` takes it off again for inference, and
:func:`measure` shows what it does. SpecXCiT's attention holds the same :class:`Correction` itself, under the name
``correction``, so that its weights keep the names that XCiT's checkpoints have.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import InputError


def condition_number(W: Tensor, rank: int | None = None) -> Tensor:
    """kappa(W) = sigma_max / sigma_min, computed in float64.

    Args:
        W: matrices, shape (..., D, k).
        rank: how many of the singular values count, where the remaining ones are zero by construction; by default
            all min(D, k).

    Returns:
        float64, shape (...). Infinite where sigma_min is zero (a singular or zero matrix).
    """
    sigma = torch.linalg.svdvals(W.detach().double())[..., :rank]
    return torch.where(sigma[..., -1] > 0, sigma[..., 0] / sigma[..., -1], torch.inf)


def svd_correction(W: Tensor) -> Tensor:
    """The exact correction C = sigma_max U V^T for W = U S V^T (Theorem 3.5), so that kappa(W + C) <= 2.

    W + C = U (S + sigma_max I) V^T, hence kappa(W + C) = 2 sigma_max / (sigma_min + sigma_max). U V^T is the thin
    polar factor when W is rectangular; where W is rank-deficient any completion the SVD returns serves.

    Args:
        W: matrices, shape (..., D, k).

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return (S[..., :1, None] * (U @ Vh)).to(W)


def identity_correction(W: Tensor, lam: float | Tensor) -> Tensor:
    """The cheap correction C = lam I_{D x k} (Theorem 3.8): no SVD, nothing to store.

    For lam > sigma_max(W), kappa(W + C) <= (lam + sigma_max) / (lam - sigma_max). A lam at or below sigma_max can
    make the condition number worse.

    The full form takes all heads' projection as one matrix, so that each head gets its own rows of the identity. The
    per-head form gives every head the same rectangular identity: pass the heads as a leading dimension.

    Args:
        W: matrices, shape (..., D, k). As the correction of W^T is that of W transposed, it does not matter whether
            they multiply tokens from the right, as in the paper, or are stored as torch's Linear stores them.
        lam: lambda of the paper, whose experiments use 10; or one for each matrix, of a shape that broadcasts
            against (...).

    Returns:
        C, shape, dtype and device of W, without gradient.
    """
    lam = torch.as_tensor(lam, dtype=W.dtype, device=W.device)
    return (lam[..., None, None] * torch.eye(*W.shape[-2:], dtype=W.dtype, device=W.device)).expand_as(W)


class Correction(nn.Module):
    """W -> W + C for a weight that stacks several projections, with C fixed when this module is made.

    The state dict says which conditioning it belongs to: the identity form keeps ``lam`` (a scalar, or one per head
    in the per-head form), the exact form the matrix ``C``, which training has long made impossible to recompute from
    W. Neither is a parameter, and neither loses precision when the model is cast to another dtype.

    Args:
        weight: the stacked projections, shape (blocks * D, k), for instance XCiT's qkv with three blocks.
        type: 'identity' (Theorem 3.8) or 'svd' (Theorem 3.5).
        lam: lambda of the identity form; 10 if not given, as in the paper.
        per_head: correct each head's D / heads rows as a matrix of their own, not each projection as a whole.
        blocks: how many projections are stacked along the first dimension; each is corrected by itself.
        heads: the attention's heads, for the per-head form.

    Raises:
        ValueError: on an unknown type, a ``lam`` that is not positive, one given to the 'svd' form, or rows that
            blocks and heads do not divide.
    """

    def __init__(
        self,
        weight: Tensor,
        type: str = 'identity',
        lam: float | None = None,
        per_head: bool = False,
        blocks: int = 3,
        heads: int = 1,
    ) -> None:
        super().__init__()
        self.split = (blocks, heads, -1) if per_head else (blocks, -1)
        if len(weight) % (blocks * heads if per_head else blocks):
            raise ValueError(
                f'conditioning: {len(weight)} rows are not {blocks} projections'
                + (f' of {heads} heads each' if per_head else '')
            )
        if type == 'identity':
            lam = 10.0 if lam is None else float(lam)
            if not 0 < lam < float('inf'):
                raise ValueError(f'conditioning: lam must be positive and finite, got {lam}')
            self.register_buffer('lam', torch.full((heads,) if per_head else (), lam, device=weight.device))
        elif type == 'svd':
            if lam is not None:
                raise ValueError("conditioning: 'svd' takes its scale from W and has no lam")
            C = svd_correction(weight.unflatten(0, self.split)).reshape(weight.shape)
            self.register_buffer('C', C)
        else:
            raise ValueError(f"conditioning: type must be 'identity' or 'svd', got {type!r}")

    def forward(self, W: Tensor) -> Tensor:
        """W + C, shape (blocks * D, k)."""
        return (W.unflatten(0, self.split) + self._blocks(W)).flatten(0, -2)

    def correction(self, W: Tensor) -> Tensor:
        """C, shape (blocks * D, k), in the dtype and on the device of W, of which the identity form takes no more."""
        return self._blocks(W).flatten(0, -2)

    def _blocks(self, W: Tensor) -> Tensor:
        # Of the identity form one block is kept in memory, however many there are.
        if 'C' in self._buffers:
            return self.C.to(W.dtype).unflatten(0, self.split)
        return identity_correction(W.detach().unflatten(0, self.split), self.lam)

    def _apply(self, fn, recurse: bool = True) -> Correction:
        # A lam of 0.1 that has been through float16 is another lam, and a C that has been through it another C.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if torch.promote_types(old.dtype, new.dtype) != new.dtype:
                self._buffers[name] = old.to(new.device)
        return self


# How the modules of timm, transformers, diffusers and mmdet name the linear layers that hold the projections.
_LAYOUTS = (
    {'qkv': 'QKV'},
    {'to_qkv': 'QKV'},
    {'q': 'Q', 'k': 'K', 'v': 'V'},
    {'q': 'Q', 'kv': 'KV'},
    {'wq': 'Q', 'wk': 'K', 'wv': 'V'},
    {'query': 'Q', 'key': 'K', 'value': 'V'},
    {'q_proj': 'Q', 'k_proj': 'K', 'v_proj': 'V'},
    {'to_q': 'Q', 'to_k': 'K', 'to_v': 'V'},
)


@dataclass(frozen=True)
class Projection:
    """A weight of an attention module that holds query, key or value projections, stacked along its rows.

    Attributes:
        name: where it is in the model, for instance 'blocks.0.attn.qkv'.
        roles: which projections are stacked in it, in order: 'QKV', 'KV', 'Q', 'K' or 'V'.
        attention: the attention module.
        module: the module that owns the weight: a linear layer, or the attention module itself.
        tensor: the weight's name in it.
    """

    name: str
    roles: str
    attention: nn.Module
    module: nn.Module
    tensor: str = 'weight'

    @property
    def correction(self) -> Correction | None:
        """What is added to the weight, if it is conditioned."""
        if parametrize.is_parametrized(self.module, self.tensor):
            for parametrization in self.module.parametrizations[self.tensor]:
                if isinstance(parametrization, Correction):
                    return parametrization
        own = getattr(self.attention, 'correction', None)
        return own if isinstance(own, Correction) else None

    @property
    def W(self) -> Tensor:
        """The trained weight, without its correction, shape (projections, D, k), in torch's layout (rows: outputs)."""
        if parametrize.is_parametrized(self.module, self.tensor):
            weight = self.module.parametrizations[self.tensor].original
        else:
            weight = getattr(self.module, self.tensor)
        return weight.detach().unflatten(0, (len(self.roles), -1))

    @property
    def W_plus_C(self) -> Tensor | None:
        """W + C, shape of W; None where there is no correction."""
        if self.correction is None:
            return None
        return self.correction(self.W.flatten(0, 1)).unflatten(0, (len(self.roles), -1))

    @property
    def heads(self) -> int | None:
        """The attention's number of heads, where it says so."""
        for name in ('num_heads', 'num_attention_heads', 'heads'):
            if isinstance(getattr(self.attention, name, None), int):
                return getattr(self.attention, name)
        return None


def projections(model: nn.Module) -> Iterator[Projection]:
    """Find the query, key and value projections in a model, by the names that attention modules give them.

    Raises:
        InputError: where a stacked projection cannot be told into query, key and value.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if module._qkv_same_embed_dim:
                yield Projection(f'{name}.in_proj'.lstrip('.'), 'QKV', module, module, 'in_proj_weight')
            else:
                for role in 'qkv':
                    path = f'{name}.{role}_proj'.lstrip('.')
                    yield Projection(path, role.upper(), module, module, f'{role}_proj_weight')
            continue
        linear = {child: part for child, part in module.named_children() if isinstance(part, nn.Linear)}
        for layout in _LAYOUTS:
            if not layout.keys() <= linear.keys():
                continue
            for child, roles in layout.items():
                path = f'{name}.{child}'.lstrip('.')
                # timm's MaxViT orders the rows of its qkv by head first.
                if len(roles) > 1 and (linear[child].out_features % len(roles) or getattr(module, 'head_first', False)):
                    raise InputError(f'{path}: its rows are not {", then ".join(roles)}; such a layer is not supported')
                yield Projection(path, roles, module, linear[child])
            break


@dataclass(frozen=True)
class Spectrum:
    """The extreme singular values of one corrected matrix, without and with its correction.

    The matrix is a projection as a whole, all heads together, with the role 'Q', 'K' or 'V'; in the per-head form one
    head's rows of it, with a role like 'Q0'.
    """

    name: str
    role: str
    shape: tuple[int, int]
    sigma_min: float
    sigma_max: float
    conditioned_sigma_min: float | None
    conditioned_sigma_max: float | None

    @property
    def kappa(self) -> float:
        """kappa(W)."""
        return self.sigma_max / self.sigma_min if self.sigma_min else float('inf')

    @property
    def conditioned_kappa(self) -> float | None:
        """kappa(W + C)."""
        if self.conditioned_sigma_min is None:
            return None
        return self.conditioned_sigma_max / self.conditioned_sigma_min if self.conditioned_sigma_min else float('inf')


class Report(list[Spectrum]):
    """The spectra of a model's projections; printed, a table."""

    def __str__(self) -> str:
        width = max([len(row.name) for row in self] + [10])
        lines = [f'{"projection":{width}}    {"sigma_min":>10}{"sigma_max":>10}{"kappa(W)":>10}{"kappa(W+C)":>12}']
        for row in self:
            after = '-' if row.conditioned_kappa is None else f'{row.conditioned_kappa:.4g}'
            figures = f'{row.sigma_min:>10.3g}{row.sigma_max:>10.3g}{row.kappa:>10.4g}{after:>12}'
            lines.append(f'{row.name:{width}} {row.role:3}{figures}')
        return '\n'.join(lines)

    def unhelpful(self) -> str:
        """Say in words which corrections do not improve the condition number, with the numbers; '' if all do."""
        worse = [row for row in self if row.conditioned_kappa is not None and not row.conditioned_kappa < row.kappa]
        if not worse:
            return ''
        worst = max(worse, key=lambda row: row.conditioned_kappa / row.kappa if row.kappa < float('inf') else 0)
        return (
            f'the correction does not improve the condition number of {len(worse)} of {len(self)} projections; for '
            f'instance {worst.name} {worst.role}: kappa {worst.kappa:.4g} -> {worst.conditioned_kappa:.4g}, with '
            f'sigma_max {worst.sigma_max:.3g}. lam should be well above sigma_max'
        )


def _spectra(found: list[Projection]) -> Report:
    report = Report()
    for projection in found:
        W, W_plus_C, roles = projection.W, projection.W_plus_C, list(projection.roles)
        if W_plus_C is not None and len(projection.correction.split) == 3:  # the per-head form
            heads = projection.correction.split[1]
            roles = [f'{role}{head}' for role in roles for head in range(heads)]
            W, W_plus_C = (stack.unflatten(1, (heads, -1)).flatten(0, 1) for stack in (W, W_plus_C))
        # Not every accelerator has float64, and to none are a few small matrices worth its while.
        sigma = torch.linalg.svdvals(W.cpu().double())
        conditioned = [None] * len(sigma) if W_plus_C is None else torch.linalg.svdvals(W_plus_C.cpu().double())
        for role, before, after in zip(roles, sigma, conditioned):
            extremes = (None, None) if after is None else (after[-1].item(), after[0].item())
            report.append(
                Spectrum(projection.name, role, tuple(W.shape[1:]), before[-1].item(), before[0].item(), *extremes)
            )
    return report


def measure(model: nn.Module) -> Report:
    """The extreme singular values and condition numbers of every query, key and value projection of a model.

    Each projection is taken as a whole, all heads together, for a single head's rows are well conditioned from the
    start; only where the per-head form corrects it, head by head.

    Args:
        model: any model whose attention :func:`projections` finds, conditioned or not.
    """
    return _spectra(list(projections(model)))


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
        weight, heads = getattr(projection.module, projection.tensor), projection.heads or 1
        corrections.append(Correction(weight, type, lam, per_head, blocks=len(projection.roles), heads=heads))
    for projection, correction in zip(found, corrections):
        parametrize.register_parametrization(projection.module, projection.tensor, correction)
    report = _spectra(found)
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
            weight = getattr(projection.module, projection.tensor)
            weight.data = projection.correction(weight.data)
            projection.attention.correction = None


_RECORD = re.compile(r'(^|\.)(correction|parametrizations\.\w+\.\d+)\.(lam|C)$')


def describe_conditioning(state_dict: dict[str, Tensor]) -> str:
    """Say in words which conditioning the weights in a state dict were made with, in the form configs use."""
    described = set()
    for key, value in state_dict.items():
        record = _RECORD.search(key)
        if record and record[3] == 'lam':
            per_head = ', per_head=True' if value.ndim else ''
            described.add(f"dict(type='identity', lam={value.flatten()[0].item():g}{per_head})")
        elif record:
            described.add("dict(type='svd')")
    return ' and '.join(sorted(described)) or 'None'


def require_same_conditioning(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    """Refuse weights made with another conditioning than the model's: they would mean something else in it.

    Args:
        theirs: the state dict to be loaded.
        ours: the model's own.

    Raises:
        InputError: if the two differ.
    """
    made_with, configured = describe_conditioning(theirs), describe_conditioning(ours)
    if made_with != configured:
        raise InputError(
            f'the weights were made with conditioning={made_with}, but the backbone is configured with '
            f'conditioning={configured}. Set conditioning={made_with} in the config, or use weights made with the '
            'configured conditioning; tools/convert_checkpoint.py --condition takes plain ones over.'
        )
