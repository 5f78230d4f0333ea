"""Verify that a changed weight changes a model's output as the projections W + C predict, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import InputError
from .finding.names import find_fault
from .finding.projections import Projection
from .finding.running import Run

# New values of weights, by (module, name of the tensor).
Changes = dict[tuple[nn.Module, str], Tensor]

_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3, torch.float64: 1e-9}

# Functions that compute with a weight as it is, or pass it on in another shape or type.
_NAMES = """
linear bilinear conv1d conv2d conv3d matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm einsum tensordot cat stack
multi_head_attention_forward t transpose permute movedim view reshape flatten unflatten squeeze unsqueeze expand chunk
split tensor_split unbind select narrow __getitem__ __get__ contiguous to type type_as float half bfloat16 double cpu
cuda detach clone
"""
_USES = set(_NAMES.split())


def reject_wrapped_model(model: nn.Module) -> None:
    """Raise an InputError if a model's weights are sharded or have adapters."""
    for name, module in model.named_modules():
        if hasattr(module, 'lora_A') or hasattr(module, 'base_layer'):
            raise InputError(f'condition: {name} has an adapter (LoRA); call condition before get_peft_model')
        if 'FullyShardedDataParallel' in type(module).__name__:
            raise InputError(f'condition: {name or "the model"} is sharded; call condition before sharding')
    for name, parameter in model.named_parameters():
        if hasattr(parameter, 'placements'):
            raise InputError(f'condition: {name} is sharded; call condition before fully_shard')


def find_obstacle(projection: Projection, keep_function: bool = False) -> str | None:
    """The reason why no correction can be added to a projection's weight; None if it can."""
    module, tensor = projection.module, projection.tensor
    if projection.correction is not None:
        return 'is conditioned already; call fold(model) first, which adds C to W'
    if not keep_function and tensor in getattr(module, 'conditioned_tensors', ()):
        return 'is conditioned already, by an earlier call of condition; build the model again'
    if fault := find_fault(module, tensor):
        return fault
    if projection.weight.is_meta:
        return 'is on the meta device and has no values; load or initialise it first'
    return _find_fault_of_layer(module, tensor)


def find_shared_memory(model: nn.Module, found: list[Projection]) -> dict[str, str]:
    """Return the projections whose weights share memory with other tensors of the model, with the reason."""
    tensors = {}
    for path, module in model.named_modules():
        for key, x in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not x.is_meta and x.numel() and x.layout is torch.strided:
                length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
                end = x.data_ptr() + length * x.element_size()
                tensors[module, key] = f'{path}.{key}'.lstrip('.'), x.device, x.data_ptr(), end
    shared = {}
    for projection in found:
        owner = projection.module, projection.tensor
        _, device, start, end = tensors.get(owner, ('', None, 0, 0))
        for other, (name, other_device, other_start, other_end) in tensors.items():
            if other != owner and device == other_device and start < other_end and other_start < end:
                shared[projection.name] = f'shares its weight with {name}, which would change as well'
    return shared


class _Prediction(TorchFunctionMode):
    """Computes as if weights had other values, wherever they are used as they are."""

    def __init__(self, changes: Changes) -> None:
        super().__init__()
        self.weights = [getattr(module, tensor) for module, tensor in changes]  # kept, so that no id is used again
        self.values = {id(weight): value for weight, value in zip(self.weights, changes.values())}
        self.used: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def substitute(x: Tensor) -> Tensor:
            if id(x) in self.values:
                self.used.add(id(x))
            return self.values.get(id(x), x)

        kwargs = kwargs or {}
        if getattr(func, '__name__', '') in _USES:
            args, kwargs = tree_map_only(Tensor, substitute, (args, kwargs))
        return func(*args, **kwargs)


@torch.no_grad()
def apply_changes(changes: Changes) -> Changes:
    """Write new values into weights; returns the old ones. If one cannot be written, all keep their old values."""
    before = {(module, tensor): getattr(module, tensor).detach().clone() for module, tensor in changes}
    try:
        for (module, tensor), value in changes.items():
            getattr(module, tensor).copy_(value)
    except BaseException:
        for module, tensor in changes:
            if not torch.equal(getattr(module, tensor), before[module, tensor]):
                getattr(module, tensor).copy_(before[module, tensor])
        raise
    return before


def _find_fault_of_layer(module: nn.Module, tensor: str) -> str | None:
    """Run a linear layer or an nn.MultiheadAttention with a temporarily changed weight."""
    weight, generator = getattr(module, tensor).detach(), torch.Generator().manual_seed(0)

    def make_tokens(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight)

    value = weight + make_tokens(*weight.shape) * weight.abs().amax().clamp_min(0.1)
    changes = {(module, tensor): value}

    if isinstance(module, nn.MultiheadAttention):
        inputs = [make_tokens(3, 3, width) for width in (module.embed_dim, module.kdim, module.vdim)]
    else:
        inputs = [make_tokens(3, weight.shape[0 if type(module).__name__ == 'Conv1D' else 1], *weight.shape[2:])]
    run = Run(module, tuple(inputs), {})
    try:
        with _Prediction(changes) as prediction:
            expected = run()
    except Exception as error:
        return f'does not run on random tokens ({type(error).__name__})'
    before = apply_changes(changes)
    try:
        actual = run()
        stays = torch.equal(getattr(module, tensor), value)
    finally:
        apply_changes(before)
    if not prediction.used:
        return 'is not used directly by its layer'
    if not stays or not _are_close(expected, actual):
        return 'is recomputed or changed by its layer before it is used'
    return None


def change_and_verify(changes: Changes, runs: list[Run]) -> None:
    """Change weights; if the output of a run does not change as predicted, undo it and raise an InputError."""
    with _Prediction(changes):
        expected = [run() for run in runs]
    before = apply_changes(changes)
    try:
        for run, output in zip(runs, expected):
            same = _are_close(output, run())
            for (module, tensor), value in changes.items():
                if not torch.equal(getattr(module, tensor), value):
                    raise InputError(
                        f'condition: the model overwrites {tensor} of {type(module).__name__}. Nothing was changed'
                    )
            if same:
                continue
            apply_changes(before)
            if _are_close(run(), run()):  # or else it is random, as BigBird's attention
                raise InputError(
                    f'condition: the output of {type(run.module).__name__} does not change as W + C predicts: its '
                    'weights are recomputed or used elsewhere as well. Nothing was changed'
                )
            apply_changes(changes)
    except BaseException:
        apply_changes(before)
        raise


def _are_close(expected: object, actual: object) -> bool:
    """Return whether all floating-point tensors in two outputs are equal up to rounding."""
    pairs = zip(tree_leaves(expected), tree_leaves(actual))
    for x, y in ((x, y) for x, y in pairs if isinstance(x, Tensor) and x.is_floating_point()):
        tolerance = _TOLERANCE.get(x.dtype, 1e-3) * max(
            x.nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0, 1e-6
        )
        if not torch.allclose(x, y, rtol=0, atol=tolerance, equal_nan=True):
            return False
    return True
