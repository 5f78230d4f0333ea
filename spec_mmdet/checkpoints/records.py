"""Rebuild the records of a checkpoint as plain data, with a stand-in for each name that a pickle may use.

MMEngine's checkpoints contain NumPy numbers and histories of logged scalars; XCiT's contain the arguments of the
training script. PyTorch's weights-only loading is not enough for them: NumPy's functions also build arrays of objects
whose pointers are bytes of the file, and some allowed functions accept arguments that exhaust memory or take hours. The
stand-ins only store their arguments. :func:`rebuild` then validates these and makes tensors, numeric arrays and
histories from them.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor
from torch.storage import TypedStorage

from ..errors import InputError


class Dtype:
    """Stand-in for numpy.dtype: kind and size of a number, and its byte order."""

    def __init__(self, code: object = None, *_) -> None:
        if not isinstance(code, str) or not re.fullmatch('[biufcSU][0-9]{1,6}', code):
            raise InputError(f'contains NumPy data of type {code!r:.40}; only plain numbers are read')
        self.code, self.order = code, '='

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): plain numbers have only the first two
        if not isinstance(state, tuple) or state[1:5] not in ((order, None, None, None) for order in '<>|='):
            raise InputError('contains NumPy data that are not plain numbers; only these are read')
        self.order = state[1]

    def read(self, content: object, shape: object) -> np.ndarray:
        """Return bytes as an array of a shape, which must need exactly these bytes."""
        if not isinstance(content, bytes) or not isinstance(shape, tuple):
            raise InputError('contains a corrupt NumPy array')
        try:
            dtype = np.dtype(self.order.replace('|', '=') + self.code)
        except TypeError as error:
            raise InputError(f'contains NumPy data of the unknown type {self.code!r}') from error
        plain = all(type(side) is int and side >= 0 for side in shape) and len(shape) <= 8
        if not plain or math.prod(shape) * dtype.itemsize != len(content):
            raise InputError('contains a NumPy array whose shape does not match its content')
        return np.frombuffer(content, dtype).copy()


class Array:
    """Stand-in for numpy.ndarray and for the function that makes an empty one."""

    def __init__(self, *_) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], Dtype):
            raise InputError('contains a corrupt NumPy array')
        _, shape, dtype, is_fortran, content = state
        self.array = dtype.read(content, shape).reshape(shape, order='F' if is_fortran is True else 'C')

    def rebuild(self) -> np.ndarray:
        if self.array is None:
            raise InputError('contains a NumPy array without content')
        return self.array


def rebuild_scalar(dtype: object = None, content: object = None, *_) -> np.generic:
    """Stand in for the function that makes NumPy's scalars."""
    if not isinstance(dtype, Dtype):
        raise InputError('contains a corrupt NumPy scalar')
    return dtype.read(content, ())[0]


class History:
    """Stand-in for MMEngine's HistoryBuffer, of which it keeps only the numbers."""

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}

    def rebuild(self) -> HistoryBuffer:
        state = getattr(self, 'state', {})
        values, counts = (state.get(name) for name in ('_log_history', '_count_history'))
        for array in (values, counts):
            if not isinstance(array, Array) or array.rebuild().ndim != 1:
                raise InputError('contains a corrupt history of logged values')
        length = state.get('max_length')
        if len(values.array) != len(counts.array) or type(length) is not int or length < 1:
            raise InputError('contains a corrupt history of logged values')
        return HistoryBuffer(values.array, counts.array, length)


def stand_in_for_getattr(owner: object = None, name: object = None, *_) -> None:
    """Stand in for getattr, which a pickled HistoryBuffer uses to name its own four statistics."""
    if owner is not History or name not in ('min', 'max', 'mean', 'current'):
        raise InputError(f'contains getattr({owner!r:.40}, {name!r:.40}), which is not a statistic of a history')


NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def rebuild_tensor(storage: object, offset: object, size: object, stride: object, *rest) -> Tensor:
    """Stand in for the function that makes a tensor of a storage; requires_grad and hooks are left out."""
    if not isinstance(storage, TypedStorage) or storage.dtype not in NUMBERS or any(rest[2:]):
        kind = getattr(storage, 'dtype', 'no type')
        raise InputError(f'contains a tensor of {kind}; only floats, integers and booleans are read')
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def require_plain(found: Tensor) -> Tensor:
    """Refuse a tensor that is larger than its storage (strides of 0), or is not a plain one."""
    if found.layout is not torch.strided or found.is_meta or found.dtype not in NUMBERS:
        raise InputError('contains a sparse, quantized or meta tensor; only plain tensors are read')
    if found.nbytes > found.untyped_storage().nbytes():
        raise InputError('contains a tensor that is larger than its content')
    return found


def rebuild_parameter(data: object = None, *_) -> Tensor:
    """Stand in for the function that makes a parameter of a tensor; it stays a tensor."""
    if type(data) is not Tensor:
        raise InputError('contains a corrupt parameter')
    return data


def make_container_stand_in(kind: type, *contents: type) -> Callable[..., object]:
    """Stand in for a container that is built from a container of the given types."""

    def container(content: object = (), *rest) -> object:
        if type(content) not in contents or rest:
            raise InputError(f'contains a corrupt {kind.__name__}')
        return kind(content)

    return container


def encode_bytes(text: object = None, coding: object = None) -> bytes:
    """Stand in for the function that pickles use for bytes; decoding with other codecs can take hours."""
    if not isinstance(text, str) or coding != 'latin1':
        raise InputError('contains corrupt bytes')
    return text.encode('latin1')


# All names that a file may use, with their stand-ins.
STAND_INS = {
    'argparse.Namespace': argparse.Namespace,
    'mmengine.logging.history_buffer.HistoryBuffer': History,
    'builtins.getattr': stand_in_for_getattr,
    'numpy.ndarray': Array,
    'numpy.dtype': Dtype,
    'collections.OrderedDict': make_container_stand_in(OrderedDict, list, tuple),
    'collections.Counter': make_container_stand_in(Counter, dict, tuple),
    'builtins.set': make_container_stand_in(set, list, tuple),
    'torch.Size': make_container_stand_in(tuple, list, tuple),
    'torch.device': torch.device,
    '_codecs.encode': encode_bytes,
    'torch._utils._rebuild_tensor_v2': rebuild_tensor,
    'torch._utils._rebuild_parameter': rebuild_parameter,
    'torch._utils._rebuild_parameter_with_state': rebuild_parameter,
}
for _module in ('numpy.core', 'numpy._core'):  # as NumPy 1 and NumPy 2 write it
    STAND_INS |= {f'{_module}.multiarray._reconstruct': Array, f'{_module}.multiarray.scalar': rebuild_scalar}
STAND_INS |= {str(dtype): dtype for dtype in NUMBERS}
STAND_INS |= {
    f'torch.{name}Storage': torch.serialization.StorageType(f'{name}Storage')
    for name in ('Half', 'BFloat16', 'Float', 'Double', 'Bool', 'Byte', 'Char', 'Short', 'Int', 'Long')
}


def rebuild(content: object, done: dict[int, tuple], strict: bool = True) -> object:
    """Replace the stand-ins in a checkpoint by data; changes containers in place.

    Args:
        content: the unpickled object.
        done: cache that is filled with pairs (old object, new object), by the id of the old one.
        strict: whether to refuse tensors that are not plain, and keys other than text and numbers.

    Raises:
        InputError: if something is corrupt; a RecursionError, if it is nested too deeply.
    """
    if id(content) in done:
        return done[id(content)][1]
    new = content
    if isinstance(content, Array | History):
        new = content.rebuild()
    elif isinstance(content, Tensor) and strict:
        require_plain(content)
    # Keeps the content alive, so that its id stays unique.
    done[id(content)] = content, new
    if isinstance(content, dict):
        if isinstance(content, OrderedDict):
            for name in set(vars(content)) - {'_metadata'}:  # could replace its methods
                del content.__dict__[name]
        for key, value in content.items():
            if strict and not isinstance(key, str | bytes | int | float | None):
                raise InputError(f'contains a {type(key).__name__} as a key; only text and numbers are read')
            content[key] = rebuild(value, done, strict)
    elif isinstance(content, list):
        content[:] = [rebuild(value, done, strict) for value in content]
    elif type(content) is tuple:
        new = tuple([rebuild(value, done, strict) for value in content])
        done[id(content)] = content, new
    elif isinstance(content, argparse.Namespace):
        rebuild(vars(content), done, strict)
    elif isinstance(content, Dtype) or content in (Dtype, Array, History):
        raise InputError('contains a corrupt record')
    return new
