"""What may be in a checkpoint, name by name, rebuilt as data.

MMEngine's checkpoints hold NumPy's numbers and the histories of its logged scalars, XCiT's the arguments of its
training script. Weights-only loading can be told to allow NumPy's own functions for that, but these build arrays of
objects, too, whose pointers are bytes of the file; and what it allows by itself can be called with arguments that take
all memory, or hours. In the place of every such name, what is here takes what the file says and :func:`rebuild` makes
plain tensors, numeric arrays and histories of it, or refuses.
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
    """Stands in for numpy.dtype: the type of a number, as (kind and size, byte order)."""

    def __init__(self, code: object = None, *_) -> None:
        if not isinstance(code, str) or not re.fullmatch('[biufcSU][0-9]{1,6}', code):
            raise InputError(f'holds NumPy data of the type {code!r:.40}; only plain numbers are read')
        self.code, self.order = code, '='

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags): plain numbers have the first two alone
        if not isinstance(state, tuple) or state[1:5] not in ((order, None, None, None) for order in '<>|='):
            raise InputError('holds NumPy data that are not plain numbers; only those are read')
        self.order = state[1]

    def read(self, content: object, shape: object) -> np.ndarray:
        """The array of a shape that bytes hold, which must be exactly its."""
        if not isinstance(content, bytes) or not isinstance(shape, tuple):
            raise InputError('holds a NumPy array that is damaged')
        try:
            dtype = np.dtype(self.order.replace('|', '=') + self.code)
        except TypeError as error:
            raise InputError(f'holds NumPy data of the type {self.code!r}, which there is not') from error
        if not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 8:
            raise InputError('holds a NumPy array that is damaged')
        if math.prod(shape) * dtype.itemsize != len(content):
            raise InputError('holds a NumPy array of another size than its content')
        return np.frombuffer(content, dtype).copy()


class Array:
    """Stands in for numpy.ndarray and for the function that makes an empty one, to be filled."""

    def __init__(self, *_) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], Dtype):
            raise InputError('holds a NumPy array that is damaged')
        _, shape, dtype, is_fortran, content = state
        self.array = dtype.read(content, shape).reshape(shape, order='F' if is_fortran is True else 'C')

    def rebuilt(self) -> np.ndarray:
        if self.array is None:
            raise InputError('holds a NumPy array without content')
        return self.array


def scalar(dtype: object = None, content: object = None, *_) -> np.generic:
    """Stand in for the function that makes NumPy's scalars."""
    if not isinstance(dtype, Dtype):
        raise InputError('holds a NumPy scalar that is damaged')
    return dtype.read(content, ())[0]


class History:
    """Stands in for MMEngine's HistoryBuffer, of which it keeps the numbers alone."""

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}

    def rebuilt(self) -> HistoryBuffer:
        state = getattr(self, 'state', {})
        values, counts = (state.get(name) for name in ('_log_history', '_count_history'))
        for array in (values, counts):
            if not isinstance(array, Array) or array.rebuilt().ndim != 1:
                raise InputError('holds a history of logged values that is damaged')
        length = state.get('max_length')
        if len(values.array) != len(counts.array) or type(length) is not int or length < 1:
            raise InputError('holds a history of logged values that is damaged')
        return HistoryBuffer(values.array, counts.array, length)


def method_of_history(owner: object = None, name: object = None, *_) -> None:
    """Stand in for getattr, which a pickled HistoryBuffer uses to name its own four statistics."""
    if owner is not History or name not in ('min', 'max', 'mean', 'current'):
        raise InputError(f'holds getattr({owner!r:.40}, {name!r:.40}), which is no statistic of a history')


NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def tensor(storage: object, offset: object, size: object, stride: object, *rest) -> Tensor:
    """Stand in for the function that makes a tensor of a storage; a gradient that it may require, and hooks, are left
    out.
    """
    if not isinstance(storage, TypedStorage) or storage.dtype not in NUMBERS or any(rest[2:]):
        kind = getattr(storage, 'dtype', 'no type')
        raise InputError(f'holds a tensor of {kind}; only plain ones of floats, integers and booleans are read')
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def require_plain(found: Tensor) -> Tensor:
    """Refuse a tensor that has more elements than its storage, as one of strides 0 has, or that is no plain one."""
    if found.layout is not torch.strided or found.is_meta or found.dtype not in NUMBERS:
        raise InputError('holds a tensor that is sparse, quantized or without content; only plain ones are read')
    if found.nbytes > found.untyped_storage().nbytes():
        raise InputError('holds a tensor that is larger than its content')
    return found


def parameter(data: object = None, *_) -> Tensor:
    """Stand in for the function that makes a parameter of a tensor; it stays a tensor."""
    if type(data) is not Tensor:
        raise InputError('holds a parameter that is damaged')
    return data


def filled(kind: type, *contents: type) -> Callable[..., object]:
    """Stand in for a container that is made of another one, of these kinds alone, which the file spells out."""

    def container(content: object = (), *rest) -> object:
        if type(content) not in contents or rest:
            raise InputError(f'holds a {kind.__name__} that is damaged')
        return kind(content)

    return container


def encoded(text: object = None, coding: object = None) -> bytes:
    """Stand in for the function by which bytes are pickled; other codings can take hours."""
    if not isinstance(text, str) or coding != 'latin1':
        raise InputError('holds bytes that are damaged')
    return text.encode('latin1')


# Under the names that files have for them: all that a file may name.
STAND_INS = {
    'argparse.Namespace': argparse.Namespace,
    'mmengine.logging.history_buffer.HistoryBuffer': History,
    'builtins.getattr': method_of_history,
    'numpy.ndarray': Array,
    'numpy.dtype': Dtype,
    'collections.OrderedDict': filled(OrderedDict, list, tuple),
    'collections.Counter': filled(Counter, dict, tuple),
    'builtins.set': filled(set, list, tuple),
    'torch.Size': filled(tuple, list, tuple),
    'torch.device': torch.device,
    '_codecs.encode': encoded,
    'torch._utils._rebuild_tensor_v2': tensor,
    'torch._utils._rebuild_parameter': parameter,
    'torch._utils._rebuild_parameter_with_state': parameter,
}
for _module in ('numpy.core', 'numpy._core'):  # as NumPy 1 and NumPy 2 write it
    STAND_INS |= {f'{_module}.multiarray._reconstruct': Array, f'{_module}.multiarray.scalar': scalar}
STAND_INS |= {str(dtype): dtype for dtype in NUMBERS}
STAND_INS |= {
    f'torch.{name}Storage': torch.serialization.StorageType(f'{name}Storage')
    for name in ('Half', 'BFloat16', 'Float', 'Double', 'Bool', 'Byte', 'Char', 'Short', 'Int', 'Long')
}


def rebuild(content: object, done: dict[int, tuple], strict: bool = True) -> object:
    """The content of a checkpoint with data in the place of what stands in for them; containers are changed in place.

    Args:
        content: what was unpickled.
        done: gets all that is in it, as pairs of what it was and what it is now.
        strict: whether to refuse tensors that are not plain ones, and names other than texts and numbers.

    Raises:
        InputError: where something in it is damaged, or a tensor that is not a plain one.
        RecursionError: where it is nested as no checkpoint is.
    """
    if id(content) in done:
        return done[id(content)][1]
    new = content
    if isinstance(content, Array | History):
        new = content.rebuilt()
    elif isinstance(content, Tensor) and strict:
        require_plain(content)
    # With the content, which must stay alive as long as its number stands for it.
    done[id(content)] = content, new
    if isinstance(content, dict):
        if isinstance(content, OrderedDict):
            for name in set(vars(content)) - {'_metadata'}:  # could be in the place of its methods
                del content.__dict__[name]
        for key, value in content.items():
            if strict and not isinstance(key, str | bytes | int | float | None):
                raise InputError(f'holds a {type(key).__name__} for a name; only text and numbers are read')
            content[key] = rebuild(value, done, strict)
    elif isinstance(content, list):
        content[:] = [rebuild(value, done, strict) for value in content]
    elif type(content) is tuple:
        new = tuple([rebuild(value, done, strict) for value in content])
        done[id(content)] = content, new
    elif isinstance(content, argparse.Namespace):
        rebuild(vars(content), done, strict)
    elif isinstance(content, Dtype) or content in (Dtype, Array, History):
        raise InputError('holds a record that is damaged')
    return new
