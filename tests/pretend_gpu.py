"""Simulate a GPU: tensors that report the device ``cuda:0`` and hold real values, computed on the CPU.

``install()`` changes PyTorch in this process, before MMEngine is imported; ``selftest()`` verifies the simulation with
planted faults. It needs a PyTorch built with CUDA, whose autocast lists, autograd and composite operators it uses, and
a machine without a GPU. Checked against torch 2.14.1; it relies on private members.

What is real:

* Device errors: a CPU tensor beside ``cuda`` ones raises as on CUDA, and so does ``numpy()``. CPU tensors without
  dimensions and CPU indices pass where CUDA accepts them.
* Autocast is PyTorch's AutocastCUDA. Half precision rounds and overflows beyond 65504; products of half tensors are
  summed in float32 and rounded once, as tensor cores do.
* The device has its own random generator. Checkpoints store the location ``cuda:0``.
* Each synchronisation (``.item()``, ``nonzero``, copies between devices, boolean masks) is counted by its line:
  :func:`count_syncs`.
* ``use_nccl()``: the backend "nccl" is gloo that takes ``cuda`` tensors only.
* ``PRETEND_TF32=1``: float32 convolutions round their operands as cuDNN does unless ``allow_tf32`` is off.

What is not: time, memory, streams, the choice of cuDNN's and cuBLAS's algorithms, non-determinism of atomics, Triton
(``torch.compile`` with inductor), CUDA graphs, several devices in a process, and DDP's buckets.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import ctypes
import functools
import importlib
import os
import re
import runpy
import sys
import threading
import types

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
GPU = torch.device('cuda', 0)
CPU = torch.device('cpu')
SYNCS: collections.Counter = collections.Counter()
STATE = types.SimpleNamespace(installed=False, rng=None, syncs=False, nccl=False, gloo=set())


class PretendTensor(torch.Tensor):
    """A tensor that reports the device cuda:0; its values are in ``payload``, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, payload, requires_grad=False):
        made = torch.Tensor._make_wrapper_subclass(
            cls, payload.size(), strides=payload.stride(), storage_offset=payload.storage_offset(),
            dtype=payload.dtype, layout=payload.layout, device=GPU, requires_grad=requires_grad,
        )  # fmt: skip
        made.payload = payload
        return made

    def __init__(self, *args, **kwargs):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, **kwargs):
        text = repr(self.payload)
        return f"{text[:-1]}, device='cuda:0'{', requires_grad=True' if self.requires_grad else ''})"

    def numpy(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                            'host memory first.')  # fmt: skip
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.detach().cpu().tolist()

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def data_ptr(self):
        return self.payload.data_ptr()

    def untyped_storage(self):
        storage = self.payload.untyped_storage()
        storage.pretend = True
        return storage

    def _typed_storage(self):
        return torch.storage.TypedStorage(wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True)

    def storage(self):
        return self._typed_storage()

    def pin_memory(self, *args):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")

    def __deepcopy__(self, memo):
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(
                'Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol'
            )
        with torch.no_grad():
            made = PretendTensor(copy.deepcopy(self.payload, memo), self.requires_grad)
        memo[id(self)] = made
        if self.grad is not None:
            made.grad = copy.deepcopy(self.grad, memo)
        for name, value in self.__dict__.items():
            if name != 'payload':
                made.__dict__[name] = copy.deepcopy(value, memo)
        return made

    def __reduce_ex__(self, protocol):
        hooks = collections.OrderedDict()
        if getattr(self, '_is_param', False):
            return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, hooks)
        place = (self._typed_storage(), self.payload.storage_offset(), tuple(self.size()), self.stride())
        return torch._utils._rebuild_tensor_v2, (*place, self.requires_grad, hooks)


def unwrap(value):
    return value.payload if isinstance(value, PretendTensor) else value


def wrap(value):
    return PretendTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor) else value


def on_gpu(device) -> bool:
    return device is not None and torch.device(device).type == 'cuda'


# --------------------------------------------------------------------------------------------------------------------
# Operators

# A CPU tensor of no dimensions beside cuda ones: what is pointwise takes it, and these.
TAKE_SCALARS = {
    'where', 'masked_fill', 'masked_fill_', 'index_put', 'index_put_', '_index_put_impl_', 'fill', 'fill_', 'copy',
    'copy_', 'lerp', 'lerp_', 'clamp', 'clamp_', 'index_fill', 'index_fill_', 'scalar_tensor', 'result_type',
}  # fmt: skip
TAKE_CPU_INDICES = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index', '_unsafe_index_put'}
BETWEEN = {'copy_', 'copy', '_to_copy', '_foreach_copy_', 'set_', '_copy_from'}
WIDE = {
    'mm', 'bmm', 'addmm', 'baddbmm', 'addbmm', 'addmv', 'mv', 'dot', 'convolution', 'convolution_backward', 'linear',
    'matmul', '_convolution', 'conv2d', 'linear_backward', '_addmm_activation', 'addmm_', 'baddbmm_', 'einsum',
}  # fmt: skip
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select', '_unique2', 'unique_dim', 'unique_consecutive', 'equal',
         'is_nonzero', 'item', 'repeat_interleave', 'bincount', 'histc', 'linalg_inv_ex', 'nonzero_numpy'}  # fmt: skip
VIEWS_IN_PLACE = torch.Tag.inplace_view
EMULATED = {}


def emulate(*names):
    def take(function):
        EMULATED.update(dict.fromkeys(names, function))
        return function

    return take


def place() -> str:
    """Return the innermost lines of code outside PyTorch, up to this package's and its caller."""
    found, frame = [], sys._getframe(2)
    while frame is not None and len(found) < 4:
        name = frame.f_code.co_filename
        if '/torch/' not in name and 'pretend_gpu' not in name and not name.startswith('<'):
            short = name.split('site-packages/')[-1]
            found.append(f'{short}:{frame.f_lineno} {frame.f_code.co_name}')
            if 'spec_mmdet/' in name and len(found) >= 2:
                break
        frame = frame.f_back
    return ' < '.join(found)


def note_wait(what: str) -> None:
    if STATE.syncs:
        SYNCS[f'{what}: {place()}'] += 1


def dispatch(func, args, kwargs):
    """Run an operator on the payloads and wrap the outputs that CUDA would have on the GPU."""
    name = func._schema.name.split('::')[1]
    flat, spec = tree_flatten((args, kwargs))
    cuda = [x for x in flat if isinstance(x, PretendTensor)]
    cpu = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)]
    device = kwargs.get('device')
    if device is None and func._overloadname == 'device' and len(args) > 1:  # aten.to.device, of inference mode
        device, kwargs = args[1], {**kwargs, 'device': args[1]}
        names = [argument.name for argument in func._schema.arguments]
        args, kwargs = args[:1], {**dict(zip(names[2:], args[2:])), **kwargs}
    to_gpu = on_gpu(device)
    if not cuda and not to_gpu:
        if func.namespace == 'c10d':
            check_collective(func, args)
        return func(*args, **kwargs)
    if to_gpu and (torch.device(device).index or 0) >= max(1, torch.cuda.device_count()):
        raise RuntimeError('CUDA error: invalid device ordinal')
    if any(x.device.type == 'meta' for x in cpu):
        cpu = [x for x in cpu if x.device.type != 'meta']
        if cuda and name not in BETWEEN:
            raise RuntimeError(f'Tensor on device meta is not on the expected device cuda:0! ({func})')
    if cuda and cpu and name not in BETWEEN:
        check_devices(func, name, args, kwargs, cpu)
    if STATE.syncs:
        count_waits(func, name, args, kwargs, cuda)

    device_of_outputs = GPU
    if device is not None:
        kwargs = {**kwargs, 'device': CPU if to_gpu else torch.device(device)}
        if not to_gpu and torch.device(device).type == 'cpu':
            device_of_outputs = CPU
        if torch.device(device).type == 'meta':
            device_of_outputs = CPU
    elif name in ('copy_', '_foreach_copy_') and not isinstance(first_tensor(args), PretendTensor):
        device_of_outputs = CPU
    if 'pin_memory' in kwargs:
        kwargs = {k: v for k, v in kwargs.items() if k != 'pin_memory'}
    if name in ('is_pinned',):
        return False
    generator = kwargs.get('generator')
    if generator is not None and device_of_outputs == GPU and not getattr(generator, 'pretend', False):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    inner_args, inner_kwargs = tree_map_only(PretendTensor, unwrap, (args, kwargs))
    if func.namespace == 'c10d' or func.namespace == '_c10d_functional':
        return collective(func, args, kwargs, inner_args, inner_kwargs)
    random = torch.Tag.nondeterministic_seeded in func.tags and generator is None and device_of_outputs == GPU
    with gpu_rng() if random else contextlib.nullcontext():
        out = compute(func, name, inner_args, inner_kwargs)

    if VIEWS_IN_PLACE in func.tags:
        target = args[0]
        if isinstance(target, PretendTensor):
            with torch.utils._mode_utils.no_dispatch():
                if name in ('resize_', 'resize_as_', 'set_'):
                    torch.ops.aten.as_strided_.default(target, target.payload.size(), target.payload.stride(),
                                                       target.payload.storage_offset())  # fmt: skip
                else:
                    func(*args, **kwargs)
        return target
    return rewrap(func, args, kwargs, out, device_of_outputs)


def rewrap(func, args, kwargs, out, device):
    """Return outputs as CUDA does: an argument that was written itself, or a tensor on the GPU."""
    returns = func._schema.returns
    if len(returns) == 0 or out is None:
        return out
    outputs = (out,) if len(returns) == 1 else tuple(out)
    given = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            for alias in argument.alias_info.before_set | argument.alias_info.after_set:
                given[alias] = value
    result = []
    for declared, value in zip(returns, outputs):
        info = declared.alias_info
        if info is not None and info.is_write and given:
            alias = next(iter(info.before_set | info.after_set))
            original = given.get(alias)
            if isinstance(original, PretendTensor) and original.shape != original.payload.shape:
                with torch.utils._mode_utils.no_dispatch():
                    aten.as_strided_.default(original, original.payload.size(), original.payload.stride(), 0)
            result.append(original)
        else:
            result.append(tree_map(wrap, value) if device == GPU else value)
    return result[0] if len(returns) == 1 else tuple(result)


def first_tensor(args):
    for value in tree_flatten(args)[0]:
        if isinstance(value, torch.Tensor):
            return value
    return None


def check_devices(func, name, args, kwargs, cpu) -> None:
    """Raise the error of CUDA for tensors on different devices."""
    wrong = [x for x in cpu if x.dim() > 0]
    first = first_tensor(args)
    if name in TAKE_CPU_INDICES and isinstance(first, PretendTensor):
        indices = args[1] if len(args) > 1 else kwargs.get('indices')
        allowed = {id(x) for x in indices if x is not None}
        wrong = [x for x in wrong if id(x) not in allowed]
    elif name in TAKE_CPU_INDICES:
        raise RuntimeError('indices should be either on cpu or on the same device as the indexed tensor (cpu)')
    scalars = [x for x in cpu if x.dim() == 0]
    fine = torch.Tag.pointwise in func.tags or name in TAKE_SCALARS | TAKE_CPU_INDICES or name.startswith('_foreach')
    if scalars and not fine:
        wrong = wrong or scalars
    writes = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if not wrong and writes and first is not None and not isinstance(first, PretendTensor):
        wrong = [first]
    if wrong:
        raise RuntimeError(
            'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! '
            f'(when checking arguments in method {func}, a CPU tensor of shape {tuple(wrong[0].shape)})'
        )


def count_waits(func, name, args, kwargs, cuda) -> None:
    if not cuda:
        if name == '_to_copy' and not kwargs.get('non_blocking'):
            note_wait('copy to the GPU (blocks unless pinned and non_blocking)')
        return
    if name in WAITS:
        note_wait(name)
    elif name == '_to_copy' and 'device' in kwargs and kwargs['device'] is not None and not on_gpu(kwargs['device']):
        note_wait('copy to the CPU')
    elif name == 'copy_' and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor):
        note_wait('copy_ between devices')
    elif name in TAKE_CPU_INDICES and isinstance(args[0], PretendTensor):
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                note_wait(f'{name} by a boolean mask')
            elif index is not None and not isinstance(index, PretendTensor) and index.dim():
                note_wait(f'{name} by an index on the CPU')


def compute(func, name, args, kwargs):
    """Run an operator on CPU tensors with CUDA's precision; CUDA's own operators are emulated."""
    if name in EMULATED:
        return EMULATED[name](func, *args, **kwargs)
    halves = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor) and x.dtype in HALF]
    if not halves and name in TF32 and TF32[name]():
        args, kwargs = tree_map_only(torch.Tensor, tf32, (args, kwargs))
    if halves and name in WIDE:
        return widened(func, args, kwargs, halves[0].dtype)
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        text = str(error)
        if halves and ('not implemented for' in text or 'BFloat16' in text or 'Half' in text):
            return widened(func, args, kwargs, halves[0].dtype)
        raise


def _by_cudnn() -> bool:
    return bool(os.environ.get('PRETEND_TF32')) and torch.backends.cudnn.allow_tf32


# Which products are TF32's is PyTorch's setting: those of cuDNN are by default, those of cuBLAS are not.
TF32 = dict.fromkeys(('convolution', 'convolution_backward'), _by_cudnn)


def tf32(x):
    """Round a float32 tensor to the 10 bits of mantissa that tensor cores use."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32) if x.numel() else x
    return x if not x.numel() else ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def widened(func, args, kwargs, dtype):
    """Run an operator in float32 and round its results."""
    originals = []

    def widen(x):
        if x.dtype in HALF:
            wide = x.float()
            originals.append((x, wide))
            return wide
        return x

    args, kwargs = tree_map_only(torch.Tensor, widen, (args, kwargs))
    out = func(*args, **kwargs)
    written = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    if written:
        for narrow, wide in originals:
            narrow.copy_(wide)
    asked = kwargs.get('dtype')
    return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.dtype == torch.float32 and asked is None else x, out)


@contextlib.contextmanager
def gpu_rng():
    """Use the device's random generator instead of the CPU's."""
    kept = torch.get_rng_state()
    torch.set_rng_state(STATE.rng)
    try:
        yield
    finally:
        STATE.rng = torch.get_rng_state()
        torch.set_rng_state(kept)


@emulate('cudnn_batch_norm')
def _(func, x, weight, bias, mean, var, training, momentum, eps):
    out, save_mean, save_invstd = aten.native_batch_norm.default(x, weight, bias, mean, var, training, momentum, eps)
    return out, save_mean, save_invstd, torch.empty(0, dtype=torch.uint8)


@emulate('cudnn_batch_norm_backward')
def _(func, x, grad, weight, mean, var, save_mean, save_invstd, eps, reserve):
    return aten.native_batch_norm_backward.default(
        grad.contiguous(), x, weight, mean, var, save_mean, save_invstd, True, eps, [True, True, True]
    )


@emulate('cudnn_grid_sampler')
def _(func, x, grid):
    return aten.grid_sampler_2d.default(x, grid, 0, 0, True)


@emulate('cudnn_grid_sampler_backward')
def _(func, x, grid, grad):
    return aten.grid_sampler_2d_backward.default(grad, x, grid, 0, 0, True, [True, True])


@emulate('_fused_sdp_choice')
def _(func, *args, **kwargs):
    return 0


@emulate('_softmax', '_log_softmax')
def _(func, x, dim, half_to_float):
    y = func(x.float() if x.dtype in HALF else x, dim, False)
    return y if half_to_float else y.to(x.dtype)


@emulate('_softmax_backward_data', '_log_softmax_backward_data')
def _(func, grad, output, dim, input_dtype):
    wide = torch.float32 if output.dtype in HALF else output.dtype
    return func(grad.to(wide), output.to(wide), dim, wide).to(input_dtype)


@emulate('_fused_dropout')
def _(func, x, p, generator=None):
    mask = torch.rand_like(x, dtype=torch.float32) < p
    return x * mask / p, mask.to(torch.uint8)


@emulate('_masked_scale')
def _(func, x, mask, scale):
    return x * mask * scale


@emulate('batch_norm_stats')
def _(func, x, eps):
    dims = [d for d in range(x.dim()) if d != 1]
    wide = x.float()
    return wide.mean(dims), (wide.var(dims, unbiased=False) + eps).rsqrt()


@emulate('batch_norm_gather_stats_with_counts')
def _(func, x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    var = invstd.float().pow(-2) - eps
    n = counts.float()[:, None]
    total = n.sum()
    whole = (mean * n).sum(0) / total
    variance = ((var + (mean - whole).square()) * n).sum(0) / total
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(momentum * whole)
        running_var.mul_(1 - momentum).add_(momentum * variance * total / (total - 1))
    return whole, (variance + eps).rsqrt()


def _channels(v, x):
    """Give a vector of channels the dimensions of images."""
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


@emulate('batch_norm_elemt')
def _(func, x, weight, bias, mean, invstd, eps):
    y = (x.float() - _channels(mean, x)) * _channels(invstd, x)
    if weight is not None:
        y = y * _channels(weight, x) + _channels(bias, x)
    return y.to(x.dtype)


@emulate('batch_norm_backward_reduce')
def _(func, grad, x, mean, invstd, weight, need_x, need_weight, need_bias):
    dims = [d for d in range(x.dim()) if d != 1]
    g, c = grad.float(), x.float() - _channels(mean, x)
    sum_dy, sum_dy_xmu = g.sum(dims), (g * c).sum(dims)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd if need_weight else None, sum_dy if need_bias else None


@emulate('batch_norm_backward_elemt')
def _(func, grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    n = count.sum()
    scale = invstd if weight is None else invstd * weight
    c = x.float() - _channels(mean, x)
    g = grad.float() - _channels(sum_dy / n, x) - c * _channels(invstd.square() * sum_dy_xmu / n, x)
    return (g * _channels(scale, x)).to(x.dtype)


def _with_out_dtype(plain):
    def run(func, *args, **kwargs):
        if func._overloadname not in ('dtype', 'dtype_out'):
            halves = [x for x in args if isinstance(x, torch.Tensor) and x.dtype in HALF]
            return widened(func, args, kwargs, halves[0].dtype) if halves else func(*args, **kwargs)
        *tensors, out_dtype = args[:-1] + (args[-1],) if 'out_dtype' not in kwargs else (*args, kwargs['out_dtype'])
        if not all(x.dtype in HALF for x in tensors[-2:]) and out_dtype != tensors[0].dtype:
            raise RuntimeError('out_dtype only supported for torch.float32 output with float16/bfloat16 inputs')
        scalars = {k: v for k, v in kwargs.items() if k in ('alpha', 'beta')}
        return plain(*[x.float() for x in tensors], **scalars).to(out_dtype)

    return run


EMULATED['mm'] = _with_out_dtype(torch.mm)
EMULATED['bmm'] = _with_out_dtype(torch.bmm)
EMULATED['addmm'] = _with_out_dtype(torch.addmm)
EMULATED['baddbmm'] = _with_out_dtype(torch.baddbmm)


# --------------------------------------------------------------------------------------------------------------------
# Collectives: NCCL takes tensors of the GPU alone


def is_nccl(group) -> bool:
    """Return whether a process group, by default that of all processes, is simulated as NCCL's."""
    return STATE.nccl and getattr(group, 'group_name', None) not in STATE.gloo


def check_collective(func, args) -> None:
    """Raise if a collective of NCCL gets CPU tensors."""
    flat = tree_flatten(args)[0]
    if not STATE.nccl or 'barrier' in func._schema.name:
        return
    groups = [torch.distributed.ProcessGroup.unbox(value) for value in flat if isinstance(value, torch.ScriptObject)
              and 'ProcessGroup' in str(value._type())]  # fmt: skip
    on_cpu = any(isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor) for value in flat)
    if on_cpu and all(map(is_nccl, groups)):
        raise RuntimeError('No backend type associated with device type cpu')


def collective(func, args, kwargs, inner_args, inner_kwargs):
    check_collective(func, args)
    out = func(*inner_args, **inner_kwargs)
    if isinstance(out, (tuple, list)) and len(out) == 2 and not isinstance(out[0], torch.Tensor):
        # (tensors, work): the tensors are those that were given
        return tree_map_only(torch.Tensor, wrap, out[0]), out[1]
    return tree_map_only(torch.Tensor, wrap, out)


# --------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of CUDA


class PretendMode(TorchDispatchMode):
    """Dispatch the operators that create tensors on the GPU or move them there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Stream:
    cuda_stream = stream_id = device_index = 0
    device = GPU

    def __init__(self, *args, **kwargs):
        pass

    def nothing(self, *args, **kwargs):
        return None

    synchronize = wait_stream = wait_event = nothing

    def query(self):
        return True

    def is_capturing(self):
        return False

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return None


class _Event:
    def __init__(self, *args, **kwargs):
        import time

        self.clock, self.time = time.perf_counter, None

    def record(self, *args):
        self.time = self.clock()

    def wait(self, *args):
        pass

    def synchronize(self):
        if STATE.syncs:
            note_wait('event.synchronize')

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1000 * max(other.time - self.time, 1e-9)


class _Generator(torch.Generator):
    pretend = True

    def __new__(cls, device='cuda'):
        return super().__new__(cls)


def _patch_generator():
    real = torch.Generator

    class Meta(type):
        def __instancecheck__(cls, instance):
            return isinstance(instance, real)

        def __call__(cls, device='cpu'):
            return _Generator(device) if torch.device(device).type == 'cuda' else real(device=device)

    torch.Generator = Meta('Generator', (), {'__doc__': real.__doc__})


def _patch_cuda():
    import resource

    def nothing(*args, **kwargs):
        return None

    def memory(*args, **kwargs):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def waits(*args, **kwargs):
        if STATE.syncs:
            note_wait('torch.cuda.synchronize')

    properties = types.SimpleNamespace(
        name='Pretend GPU', major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, gcnArchName='', uuid='pretend',
        is_integrated=False, is_multi_gpu_board=False, L2_cache_size=50 * 2**20, shared_memory_per_block_optin=232448,
        shared_memory_per_block=49152, shared_memory_per_multiprocessor=233472,
    )  # fmt: skip
    cuda = torch.cuda
    _patch_generator()
    STATE.rng = torch.get_rng_state()

    def seed(number):
        from torch._C import Generator as real

        STATE.rng = real().manual_seed(int(number)).get_state()

    def count():
        return 1

    replaced = dict(
        is_available=lambda: True,
        device_count=count,
        current_device=lambda: 0,
        set_device=nothing,
        get_device_name=lambda *a, **k: properties.name,
        get_device_properties=lambda *a, **k: properties,
        get_device_capability=lambda *a, **k: (9, 0),
        mem_get_info=lambda *a, **k: (70 * 2**30, 80 * 2**30),
        max_memory_allocated=memory,
        memory_allocated=memory,
        memory_reserved=memory,
        max_memory_reserved=memory,
        max_memory_cached=memory,
        memory_stats=lambda *a, **k: collections.OrderedDict(),
        memory_summary=lambda *a, **k: '',
        reset_peak_memory_stats=nothing,
        reset_max_memory_allocated=nothing,
        empty_cache=nothing,
        ipc_collect=nothing,
        synchronize=waits,
        Event=_Event,
        Stream=_Stream,
        current_stream=lambda *a: _Stream(),
        default_stream=lambda *a: _Stream(),
        stream=lambda s: contextlib.nullcontext(),
        set_stream=nothing,
        is_bf16_supported=lambda *a, **k: True,
        is_initialized=lambda: True,
        _lazy_init=nothing,
        init=nothing,
        _lazy_call=lambda f, **k: f(),
        manual_seed=seed,
        manual_seed_all=seed,
        seed=lambda: seed(0),
        seed_all=lambda: seed(0),
        initial_seed=lambda: 0,
        get_rng_state=lambda *a, **k: STATE.rng.clone(),
        set_rng_state=lambda state, *a, **k: setattr(STATE, 'rng', state.clone()),
        get_rng_state_all=lambda: [STATE.rng.clone()],
        set_rng_state_all=lambda states: setattr(STATE, 'rng', states[0].clone()),
        is_current_stream_capturing=lambda: False,
        _exchange_device=lambda i: 0,
        _maybe_exchange_device=lambda i: 0,
        can_device_access_peer=lambda *a: False,
        utilization=lambda *a: 0,
        get_arch_list=lambda: ['sm_90'],
        _is_in_bad_fork=lambda: False,
        _sleep=nothing,
        get_sync_debug_mode=lambda: 0,
        set_sync_debug_mode=nothing,
    )
    for name, value in replaced.items():
        setattr(cuda, name, value)
    for module in ('random', 'memory', 'streams'):
        for name, value in replaced.items():
            if hasattr(getattr(cuda, module), name):
                setattr(getattr(cuda, module), name, value)
    torch.Event = _Event
    torch._C._cuda_getCurrentRawStream = lambda *a: 0
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    torch._C._cuda_getDeviceCount = count
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_setDevice = nothing
    torch._C._cuda_exchangeDevice = lambda i: 0
    torch._C._cuda_maybeExchangeDevice = lambda i: 0
    import torch.random as random

    plain_seed = random.default_generator.manual_seed

    def manual_seed(number):
        seed(int(number))
        return plain_seed(int(number))

    manual_seed.__module__ = 'torch.random'
    torch.manual_seed = random.manual_seed = manual_seed
    with contextlib.suppress(Exception):
        acc = torch.accelerator
        acc.is_available, acc.device_count = lambda: True, count
        acc.current_accelerator = lambda check_available=False: torch.device('cuda')
        acc.current_device_index = acc.current_device_idx = lambda: 0
        acc.set_device_index = acc.set_device_idx = nothing
        acc.synchronize, acc.current_stream = waits, lambda *a: _Stream()
    torch.backends.cudnn.version = lambda: 91000
    torch.backends.cudnn.is_available = lambda: True


def _patch_tensors():
    real_to = torch.Tensor.to

    def to(self, *args, **kwargs):
        if torch._C._len_torch_dispatch_stack():
            return real_to(self, *args, **kwargs)
        with PretendMode():  # where PyTorch has lost it, as in some backward passes
            return real_to(self, *args, **kwargs)

    torch.Tensor.to = to

    def lifting(make):
        @functools.wraps(make)
        def make_and_lift(*args, **kwargs):
            torch._C._set_only_lift_cpu_tensors(True)  # of each thread, autograd's too
            return make(*args, **kwargs)

        return make_and_lift

    torch.tensor, torch.as_tensor = lifting(torch.tensor), lifting(torch.as_tensor)
    torch.Tensor.new_tensor = lifting(torch.Tensor.new_tensor)

    def cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
        return self.to('cuda' if device is None or isinstance(device, int) else device, non_blocking=non_blocking,
                       memory_format=memory_format)  # fmt: skip

    torch.Tensor.cuda = cuda
    torch.Tensor.pin_memory = lambda self, *a: (
        self.clone() if not isinstance(self, PretendTensor) else PretendTensor.pin_memory(self)
    )
    torch.Tensor.is_pinned = lambda self, *a: False
    torch.Tensor.record_stream = lambda self, stream: None

    for kind in ('torch.optim.optimizer', 'torch.utils._foreach_utils'):
        module = sys.modules.get(kind) or __import__(kind, fromlist=['x'])
        module._foreach_supported_types.append(PretendTensor)

    rebuild = torch._utils._rebuild_tensor

    def _rebuild_tensor(storage, offset, size, stride):
        made = rebuild(storage, offset, size, stride)
        return PretendTensor(made) if getattr(storage._untyped_storage, 'pretend', False) else made

    torch._utils._rebuild_tensor = _rebuild_tensor

    def tag(storage):
        return 'cuda:0' if getattr(storage, 'pretend', False) else None

    def restore(storage, location):
        if location.startswith('cuda'):
            if (torch.device(location).index or 0) >= torch.cuda.device_count():
                raise RuntimeError(f'Attempting to deserialize object on CUDA device {location} but '
                                   'torch.cuda.device_count() is 1.')  # fmt: skip
            storage.pretend = True
            return storage
        return None

    torch.serialization.register_package(5, tag, restore)


def _patch_modules():
    plain = torch.nn.Module._apply

    def apply(self, fn, recurse=True):
        """Apply as PyTorch does; parameters stay the same objects, as with ``param.data =``."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        moved = {}
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            with torch.no_grad():
                applied = fn(parameter)
            if isinstance(parameter, PretendTensor) != isinstance(applied, PretendTensor) or (
                isinstance(parameter, PretendTensor) and applied is not parameter
            ):
                moved[name] = applied
        if not moved:
            return plain(self, fn, recurse=False)
        for name, applied in moved.items():
            parameter, gradient = self._parameters[name], self._parameters[name].grad
            parameter.grad = None
            made = torch.nn.Parameter(applied.detach(), requires_grad=parameter.requires_grad)
            for key, value in vars(parameter).items():
                if key not in ('payload', '_is_param'):
                    setattr(made, key, value)
            del applied
            try:
                torch.utils.swap_tensors(parameter, made)
            except Exception as error:
                note = f'pretend_gpu: {type(self).__name__}.{name} became another object ({error})'
                print(note, file=sys.stderr)
                self._parameters[name] = parameter = made
            if gradient is not None:
                with torch.no_grad():
                    self._parameters[name].grad = fn(gradient)
        done = dict(self._parameters)
        for name in moved:
            self._parameters[name] = None
        try:
            plain(self, fn, recurse=False)
        finally:
            for name in moved:
                self._parameters[name] = done[name]
        return self

    torch.nn.Module._apply = apply


def _patch_threads():
    run = threading.Thread.run

    def in_mode(self):
        with PretendMode():
            run(self)

    threading.Thread.run = in_mode


def use_nccl() -> None:
    """Simulate the backend "nccl" from here on: gloo that takes tensors of the GPU only."""
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d

    start, backend_of = c10d.init_process_group, c10d.get_backend

    def init_process_group(backend=None, *args, **kwargs):
        STATE.nccl = 'nccl' in str(backend)
        kwargs.pop('device_id', None)
        return start('gloo' if STATE.nccl else backend, *args, **kwargs)

    def get_backend(group=None):
        return 'nccl' if is_nccl(group) else backend_of(group)

    make = c10d.new_group

    def new_group(ranks=None, timeout=None, backend=None, *args, **kwargs):
        group = make(ranks, timeout, None if backend == 'nccl' else backend, *args, **kwargs)
        if backend == 'gloo':
            STATE.gloo.add(group.group_name)
        return group

    def coll_device(group=None):
        return torch.device('cuda' if is_nccl(group) else 'cpu')

    dist.init_process_group = c10d.init_process_group = init_process_group
    dist.get_backend = c10d.get_backend = get_backend
    dist.new_group = c10d.new_group = new_group
    c10d._get_object_coll_device = coll_device
    c10d._get_pg_default_device = coll_device
    dist.is_nccl_available = c10d.is_nccl_available = lambda: True
    torch.cuda.nccl.version = lambda *a: (2, 27, 0)
    _patch_mmengine()
    _patch_ddp()


def _patch_mmengine():
    """Replace MMEngine's copy to a result on another device, which compares the types of tensors."""
    try:
        from mmengine.dist import dist, utils
    except ImportError:
        return
    plain = utils.cast_data_device

    def cast_data_device(data, device, out=None):
        if isinstance(data, torch.Tensor) and isinstance(out, torch.Tensor):
            return out.copy_(data)
        return plain(data, device, out)

    dist.cast_data_device = utils.cast_data_device = cast_data_device


def _patch_ddp():
    """Replace DistributedDataParallel, whose C++ reducer needs CUDA's events: the same averages, after backward."""
    import torch.distributed as dist
    from torch.nn.parallel import distributed

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module, device_ids=None, output_device=None, dim=0, broadcast_buffers=True,
                     find_unused_parameters=False, static_graph=False, process_group=None, **kwargs):  # fmt: skip
            super().__init__()
            self.module, self.broadcast_buffers = module, broadcast_buffers
            self.find_unused_parameters, self.require_backward_grad_sync = find_unused_parameters, True
            for value in [*module.parameters(), *module.buffers()]:
                if not isinstance(value, PretendTensor) and value.numel():
                    raise RuntimeError(f'No backend type associated with device type {value.device.type}')
                if value.numel():
                    dist.broadcast(value.detach(), 0)
            self.seen = set()
            self.queued = False
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(functools.partial(self._ready, name))

        def _ready(self, name, parameter):
            self.seen.add(name)
            if not self.queued:
                self.queued = True
                torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

        def _reduce(self):
            self.queued = False
            if not self.require_backward_grad_sync:
                return
            unused = []
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    continue
                if name not in self.seen:
                    unused.append(name)
                    if not self.find_unused_parameters:
                        continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
            if unused and not self.find_unused_parameters:
                print(f'pretend_gpu: DDP would raise at the next iteration, no gradient: {unused[:5]}', file=sys.stderr)
            self.seen.clear()

        @contextlib.contextmanager
        def no_sync(self):
            kept, self.require_backward_grad_sync = self.require_backward_grad_sync, False
            try:
                yield
            finally:
                self.require_backward_grad_sync = kept

        def forward(self, *args, **kwargs):
            if self.broadcast_buffers and self.require_backward_grad_sync:
                for value in self.module.buffers():
                    if value.numel():
                        dist.broadcast(value.detach(), 0)
            return self.module(*args, **kwargs)

    distributed.DistributedDataParallel = torch.nn.parallel.DistributedDataParallel = DistributedDataParallel
    if 'mmengine.model.wrappers.distributed' in sys.modules:
        sys.modules['mmengine.model.wrappers.distributed'].MMDistributedDataParallel.__bases__ = (
            DistributedDataParallel,
        )


def _patch_accelerator() -> None:
    """Make autograd's engine find no CUDA context on device 0, so that it uses no streams and no driver.

    It asks a virtual function of PyTorch's CUDAHooks. The position in the table of virtual functions is read from
    PyTorch's header; the object gets a copy of its table with another function there.
    """
    folder = os.path.dirname(torch.__file__)
    with open(os.path.join(folder, 'include/ATen/detail/AcceleratorHooksInterface.h')) as file:
        head = re.sub('//.*', '', file.read()).partition('struct TORCH_API AcceleratorHooksInterface')[2]
    declared = re.findall(r'virtual\s[^;{]*?(~?\w+)\(', head)
    slot = 1 + declared.index('hasPrimaryContext')  # a destructor has two places
    hooks = ctypes.CDLL(os.path.join(folder, 'lib', 'libtorch_cpu.so'))._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    table = ctypes.c_void_p.from_address(hooks())
    before, size = 2, 120  # what a table has in front of its functions, and more of them than there are
    STATE.table = (ctypes.c_void_p * (before + size)).from_buffer_copy(
        ctypes.string_at(table.value - 8 * before, 8 * (before + size))
    )
    STATE.answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda this, device: False)
    STATE.table[before + slot] = ctypes.cast(STATE.answer, ctypes.c_void_p).value
    original, table.value = table.value, ctypes.addressof(STATE.table) + 8 * before
    atexit.register(setattr, table, 'value', original)  # the object outlives Python's memory


def install() -> None:
    """Simulate a GPU in this process and those that it forks.

    Raises:
        RuntimeError: if PyTorch has no CUDA, or the machine has a GPU."""
    if STATE.installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError('there is a GPU')
    if torch.version.cuda is None:
        raise RuntimeError(f'torch {torch.__version__} is built without CUDA')
    STATE.installed = True
    importlib.import_module('torch.distributed')
    rules = importlib.import_module('torch._dynamo.trace_rules')
    rules.get_torch_obj_rule_map()  # which notes the functions of torch.cuda as they are
    torch._C._ensureCUDADeviceGuardSet()
    _patch_accelerator()
    torch._C._set_only_lift_cpu_tensors(True)
    _patch_cuda()
    _patch_tensors()
    _patch_modules()
    _patch_threads()
    PretendMode().__enter__()


@contextlib.contextmanager
def count_syncs():
    """Count synchronisations within the context; yields a Counter of places in the code."""
    SYNCS.clear()
    STATE.syncs = True
    try:
        yield SYNCS
    finally:
        STATE.syncs = False


def selftest() -> None:
    """Verify that planted faults are caught and that results equal the CPU's."""
    import io

    def raises(function, text):
        try:
            function()
        except (RuntimeError, TypeError) as error:
            assert text in str(error), (text, str(error))
            return
        raise AssertionError(f'nothing raised: {text}')

    x = torch.arange(12.0, device='cuda').reshape(3, 4)
    assert x.device == GPU and x.is_cuda and isinstance(x, PretendTensor)
    raises(lambda: x + torch.ones(4), 'same device')
    raises(lambda: x.numpy(), "can't convert cuda:0")
    raises(lambda: torch.cat([x, torch.ones(1, 4)]), 'same device')
    raises(lambda: torch.nn.Linear(4, 2)(x), 'same device')
    raises(lambda: torch.nn.Linear(4, 2).cuda()(torch.ones(1, 4)), 'same device')
    raises(lambda: torch.ones(3)[torch.ones(1, dtype=torch.long, device='cuda')], 'indices should be')
    raises(lambda: torch.ones(3).add_(torch.ones(3, device='cuda')), 'same device')
    raises(lambda: torch.rand(3, device='cuda', generator=torch.Generator()), 'generator')
    assert (x + torch.tensor(1.0)).is_cuda and x[torch.tensor([0, 2])].shape == (2, 4)
    assert not x.cpu().is_cuda and x.tolist()[1][0] == 4 and (x.cpu().numpy() == x.cpu().tolist()).all()
    big = torch.full((4,), 60000.0, device='cuda').half()
    assert torch.isinf(big + big).all() and (big.half() @ torch.ones(4, device='cuda').half()).isinf()
    with torch.autocast('cuda', torch.float16):
        a = torch.nn.functional.linear(x, torch.ones(2, 4, device='cuda'))
        assert a.dtype == torch.float16 and a.softmax(-1).dtype == torch.float32, (a.dtype, a.softmax(-1).dtype)
        assert torch.nn.functional.layer_norm(a, (2,)).dtype == torch.float32
    with torch.autocast('cuda', torch.bfloat16):
        assert torch.bmm(x[None], x[None].mT).dtype == torch.bfloat16
    assert torch.bmm(x[None].half(), x[None].mT.half(), out_dtype=torch.float32).dtype == torch.float32
    torch.manual_seed(3)
    first = torch.rand(5, device='cuda')
    torch.manual_seed(3)
    torch.rand(7)  # the CPU's generator is another
    assert torch.equal(first, torch.rand(5, device='cuda'))

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GELU(), torch.nn.Flatten(),
                              torch.nn.Linear(8 * 36, 5))  # fmt: skip
    twin, before = copy.deepcopy(net), list(net.parameters())
    net.cuda()
    assert all(a is b and a.is_cuda and isinstance(b, torch.nn.Parameter) for a, b in zip(before, net.parameters()))
    images, losses = torch.randn(4, 3, 8, 8), []
    for model, device in ((twin, 'cpu'), (net, 'cuda')):
        for setting in (dict(foreach=True), dict(fused=True), dict(foreach=False)):
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **setting)
            loss = model(images.to(device)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6, losses
    saved = io.BytesIO()
    torch.save(dict(model=net.state_dict(), optimizer=optimizer.state_dict()), saved)
    saved.seek(0)
    read = torch.load(saved, weights_only=True)
    assert read['model']['0.weight'].is_cuda and torch.equal(read['model']['0.weight'], net[0].weight)
    saved.seek(0)
    assert not torch.load(saved, map_location='cpu', weights_only=True)['model']['0.weight'].is_cuda
    saved.seek(0)
    assert torch.load(saved, map_location='cuda:0')['model']['0.weight'].is_cuda
    saved = io.BytesIO()
    torch.save(torch.ones(3), saved)
    saved.seek(0)
    assert not torch.load(saved).is_cuda
    saved.seek(0)
    assert torch.load(saved, map_location='cuda').is_cuda
    copied = copy.deepcopy(net)
    assert all(p.is_cuda and isinstance(p, torch.nn.Parameter) for p in copied.parameters())
    with torch.no_grad():
        copied[0].weight.zero_()
    assert net[0].weight.abs().sum() > 0

    scaler = torch.amp.GradScaler('cuda', init_scale=2.0**16)
    p = torch.nn.Parameter(torch.ones(3, device='cuda'))
    optimizer = torch.optim.SGD([p], 1.0)
    with torch.autocast('cuda', torch.float16):
        loss = (p * 60000).half().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15 and p.tolist() == [1.0] * 3, (scaler.get_scale(), p)
    from torch.utils.checkpoint import checkpoint

    y = checkpoint(lambda v: torch.dropout(v * p, 0.5, True).square().sum(), x[:, :3], use_reentrant=False)
    y.backward()
    import torchvision

    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 30, 30.0]], device='cuda')

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v * 2

        @staticmethod
        def backward(ctx, g):
            assert (
                g.new_tensor([1, 2]).is_cuda
                and torch.tensor(1.0, device='cuda').is_cuda
                and torch.ones(2).cuda().is_cuda
            )
            return g * torch.arange(3).to(g)

    Backward.apply(p).sum().backward()
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7], device='cuda'), 0.5).tolist() == [0, 2]
    raises(lambda: torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5), 'same device')


if __name__ == '__main__':  # python tests/pretend_gpu.py SCRIPT ARGUMENTS
    sys.modules['pretend_gpu'] = sys.modules[__name__]
    install()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name='__main__')
