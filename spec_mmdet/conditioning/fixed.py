"""Corrections of weights that hold W + C, and the step hooks that keep C fixed while an optimiser trains W."""

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
    """A parameter that holds W + C. It is looked up in its module each time, because sharding replaces it."""

    module: nn.Module
    tensor: str
    correction: Correction

    @property
    def weight(self) -> Tensor:
        """W + C."""
        return getattr(self.module, self.tensor)

    @property
    def C(self) -> Tensor:
        """C in the shape and dtype of the weight, on its device and, if it is a DTensor, sharded like it."""
        weight = self.weight
        like = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        C = self.correction.to(weight.device).make_C(like)
        if not hasattr(weight, 'placements'):
            return C
        from torch.distributed.tensor import distribute_tensor

        # Each process has all of C and takes its part.
        return distribute_tensor(C, weight.device_mesh, weight.placements, src_data_rank=None)


class Corrections(dict[str, Corrected]):
    """Corrections that :func:`~.surgery.condition` has added to a model's weights, by the names of the projections.

    The gradient with respect to W is the gradient with respect to W + C. So a model whose weights are W + C trains like
    one that stores W and C separately, if the optimiser's step sees W: see :meth:`keep_fixed`. To resume a training,
    save :meth:`state_dict` with the model's and the optimiser's.
    """

    def keep_fixed(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimiser train only W, so that C gets no weight decay; call it once, after making the optimiser.

        C is subtracted from the weights before each step and added after it, which is exact for any update rule. Under
        AdamW it is equivalent to adding lr * weight_decay * C after each step. A step that an exception ends leaves the
        weights without C until the next one. Optimisers that exchange the weights outside their step (schedule-free
        ones, for evaluation) are not supported.

        Args:
            optimizer: of the model; or a wrapper that has it as its ``optimizer``, as Accelerate's and MMEngine's.

        Raises:
            InputError: if the optimiser has no corrected weights or keeps their corrections fixed already, is not a
                torch.optim.Optimizer, or calls no step hooks (timm's Lookahead).
        """
        while hasattr(optimizer, 'optimizer'):
            optimizer = optimizer.optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(f'keep_fixed: {type(optimizer).__name__} is not a torch.optim.Optimizer. Pass one')
        if not getattr(type(optimizer).step, 'hooked', False):  # which PyTorch's Optimizer.__init__ sets
            raise InputError(
                f'keep_fixed: {type(optimizer).__name__} does not call step hooks. Call keep_fixed with the optimiser '
                'inside it, before you wrap it'
            )
        if not self._find_trained(optimizer):
            raise InputError('keep_fixed: the optimiser has no corrected weights. Pass the optimiser of this model')
        if any(getattr(hook, 'corrections', None) is self for hook in get_step_pre_hooks(optimizer)):
            raise InputError('keep_fixed: was called for this optimiser before. Call it once')
        remover = _CorrectionRemover(self, len(self._find_trained(optimizer)))
        optimizer.register_step_pre_hook(remover)
        optimizer.register_step_post_hook(remover.put_back)

    def _find_trained(self, optimizer: torch.optim.Optimizer) -> list[Corrected]:
        trained = {id(p) for group in optimizer.param_groups for p in group['params'] if p.requires_grad}
        return [corrected for corrected in self.values() if id(corrected.weight) in trained]

    def state_dict(self) -> dict[str, Tensor]:
        """Lambda of each projection, or C in the exact form: neither can be recomputed from trained weights."""
        return {
            f'{name}.{record}': value
            for name, corrected in self.items()
            for record, value in corrected.correction.state_dict().items()
        }

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Replace these corrections by those of :meth:`state_dict`. The weights stay as they are.

        Raises:
            InputError: if it is of other projections, or of another form.
        """
        ours, theirs = ({(k, v.shape) for k, v in state.items()} for state in (self.state_dict(), state_dict))
        if differing := {key for key, _ in ours ^ theirs}:
            raise InputError(f'the corrections differ from those of this model: {list_briefly(sorted(differing))}. '
                             'Load those of the same model, conditioned with the same arguments')  # fmt: skip
        for name, corrected in self.items():
            correction = corrected.correction
            correction.load_state_dict({record: state_dict[f'{name}.{record}'] for record in correction.state_dict()})


class _CorrectionRemover:
    """Hook before an optimiser's step that subtracts C from the weights; :meth:`put_back` adds it after the step."""

    def __init__(self, corrections: Corrections, count: int) -> None:
        self.corrections = corrections
        self.count = count
        self.is_out = False

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if not self.is_out:  # it is, if an exception ended the last step
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

        # A closure that evaluates the model within the step needs C.
        wrapped = tuple(with_C(arg) if callable(arg) else arg for arg in args)
        return wrapped, {key: with_C(arg) if callable(arg) else arg for key, arg in kwargs.items()}

    def put_back(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._add(optimizer, 1)

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, sign: int) -> None:
        trained = self.corrections._find_trained(optimizer)
        if len(trained) != self.count:
            raise RuntimeError(f'the optimiser has only {len(trained)} of the {self.count} weights with a correction')
        for corrected in trained:
            corrected.weight.add_(corrected.C, alpha=sign)
        self.is_out = sign < 0
