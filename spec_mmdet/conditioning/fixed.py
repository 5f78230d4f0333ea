"""Corrections of weights that hold W + C themselves, and how C stays fixed while an optimiser trains W."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor, nn

from ..compat import get_step_pre_hooks
from ..errors import InputError, list_briefly
from .correction import Correction


@dataclass(frozen=True)
class Corrected:
    """A parameter that holds W + C. It is looked up in its module each time: sharding puts another in its place."""

    module: nn.Module
    tensor: str
    correction: Correction

    @property
    def weight(self) -> Tensor:
        """W + C."""
        return getattr(self.module, self.tensor)

    @property
    def C(self) -> Tensor:
        """C as the weight is: in its shape and dtype, on its device and, where it is a DTensor, sharded like it."""
        weight = self.weight
        like = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        C = self.correction.to(weight.device).make_C(like)
        if not hasattr(weight, 'placements'):
            return C
        from torch.distributed.tensor import distribute_tensor

        # Each process has all of C and takes its own part.
        return distribute_tensor(C, weight.device_mesh, weight.placements, src_data_rank=None)


class Corrections(dict[str, Corrected]):
    """What :func:`~.surgery.condition` has added to a model's weights, by the names of the projections.

    The gradient by W is the gradient by W + C. So a model whose weights are W + C trains as one that keeps W and C
    apart, if the optimiser's own step (its weight decay, and whatever else looks at the weights) sees W:
    :meth:`keep_fixed`. A training that is to be resumed keeps :meth:`state_dict` beside the model's and the
    optimiser's.
    """

    def keep_fixed(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimiser train W alone, so that C gets no weight decay: one call, once the optimiser is made.

        Before each of its steps C is taken out of the weights, and put back after it. That is exact for any update
        rule, also for those that scale a step by the length of the weights (LAMB). Under AdamW it comes to adding
        lr * weight_decay * C after each step: decay pulls W + C towards C, not towards 0. The identity form's C is
        made anew each time, and takes no memory between the steps.

        A step that an exception ends leaves the weights without C until the next one. Optimisers that exchange the
        weights outside their step, as schedule-free ones do for evaluation, are not covered.

        Args:
            optimizer: torch's or one derived from it, whose parameters are the model's; or a wrapper that has that one
                as its ``optimizer``, as Accelerate's and MMEngine's do.

        Raises:
            InputError: if the optimiser has none of the corrected weights or keeps their corrections fixed already, or
                is none of torch's.
        """
        while hasattr(optimizer, 'optimizer'):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(f'keep_fixed: {type(optimizer).__name__} is no torch.optim.Optimizer')
        if not self._trained_by(optimizer):
            raise InputError('keep_fixed: the optimiser has none of the weights that were corrected')
        hooks = get_step_pre_hooks(optimizer)
        if any(isinstance(hook, _CorrectionRemover) and hook.corrections is self for hook in hooks):
            raise InputError('keep_fixed: was called for this optimiser before')
        remover = _CorrectionRemover(self, len(self._trained_by(optimizer)))
        optimizer.register_step_pre_hook(remover)
        optimizer.register_step_post_hook(remover.put_back)

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> list[Corrected]:
        own = {id(p) for group in optimizer.param_groups for p in group['params'] if p.requires_grad}
        return [corrected for corrected in self.values() if id(corrected.weight) in own]

    def state_dict(self) -> dict[str, Tensor]:
        """lambda of each projection, or, in the exact form, its C, which trained weights do not tell any more."""
        return {
            f'{name}.{record}': value
            for name, corrected in self.items()
            for record, value in corrected.correction.state_dict().items()
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take the corrections of :meth:`state_dict` for these. The weights stay as they are.

        Raises:
            InputError: if it is of other projections, or of another form.
        """
        own = self.state_dict()
        differing = [
            key
            for key in own.keys() | state_dict.keys()
            if key not in own or key not in state_dict or own[key].shape != state_dict[key].shape
        ]
        if differing:
            raise InputError(f'these corrections are not those of this model: {list_briefly(sorted(differing))}')
        for name, corrected in self.items():
            correction = corrected.correction
            correction.load_state_dict({record: state_dict[f'{name}.{record}'] for record in correction.state_dict()})


class _CorrectionRemover:
    """Called before an optimiser's step: takes C out of the weights."""

    def __init__(self, corrections: Corrections, count: int) -> None:
        self.corrections = corrections
        self.count = count
        self.is_out = False

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not self.is_out:  # as a step that an exception ended has left it
            self._add(optimizer, -1)

        def with_C(closure: Callable) -> Callable:
            @wraps(closure)
            def evaluate() -> object:
                self._add(optimizer, 1)
                try:
                    return closure()
                finally:
                    self._add(optimizer, -1)

            return evaluate

        # What evaluates the model within the step needs C.
        wrapped = tuple(with_C(arg) if callable(arg) else arg for arg in args)
        return wrapped, {key: with_C(arg) if callable(arg) else arg for key, arg in kwargs.items()}

    def put_back(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._add(optimizer, 1)

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, sign: int) -> None:
        trained = self.corrections._trained_by(optimizer)
        if len(trained) != self.count:
            raise RuntimeError(f'{self.count} corrections were to be kept fixed, but {len(trained)} weights are here')
        for corrected in trained:
            corrected.weight.add_(corrected.C, alpha=sign)
        self.is_out = sign < 0
