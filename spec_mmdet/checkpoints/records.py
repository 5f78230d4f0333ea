"""What checkpoints hold beside tensors and plain containers, rebuilt as data.

MMEngine's checkpoints hold NumPy's numbers and the histories of its logged scalars, XCiT's the arguments of its
training script. Weights-only loading can be told to allow NumPy's own functions for that, but these build arrays of
objects, too, whose pointers are bytes of the file. In the place of every such name, the classes here take what the file
says and :func:`rebuild` makes plain numeric arrays and histories of it, or refuses.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import OrderedDict

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor

from ..errors import InputError


class Dtype:
    """Stands in for numpy.dtype: the type of a number, as (kind and size, byte order)."""

    def __init__(self, code: object = None, *_) -> None:
        if not isinstance(code, str) or not re.fullmatch('[biufc][0-9]{1,2}', code):
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


# Under the names that files have for them.
STAND_INS = [
    argparse.Namespace,
    (History, 'mmengine.logging.history_buffer.HistoryBuffer'),
    (method_of_history, 'builtins.getattr'),
    (Array, 'numpy.ndarray'),
    (Dtype, 'numpy.dtype'),
    *(
        (stand_in, f'{module}.multiarray.{name}')
        for module in ('numpy.core', 'numpy._core')  # as NumPy 1 and NumPy 2 write it
        for stand_in, name in ((Array, '_reconstruct'), (scalar, 'scalar'))
    ),
]


def rebuild(content: object, done: dict[int, tuple] | None = None) -> object:
    """The content of a checkpoint with data in the place of what stands in for them; containers are changed in place.

    Raises:
        InputError: where something in it is damaged, or a tensor that is not a plain one.
        RecursionError: where it is nested as no checkpoint is.
    """
    done = {} if done is None else done
    if id(content) in done:
        return done[id(content)][1]
    new = content
    if isinstance(content, Array | History):
        new = content.rebuilt()
    elif isinstance(content, Tensor) and (content.is_sparse or content.is_quantized or content.is_meta):
        raise InputError('holds a tensor that is sparse, quantized or without content; only plain ones are read')
    # With the content, which must stay alive as long as its number stands for it.
    done[id(content)] = content, new
    if isinstance(content, dict):
        if isinstance(content, OrderedDict):
            for name in set(vars(content)) - {'_metadata'}:  # could be in the place of its methods
                del content.__dict__[name]
        for key, value in content.items():
            content[key] = rebuild(value, done)
    elif isinstance(content, list):
        content[:] = [rebuild(value, done) for value in content]
    elif type(content) is tuple:
        new = tuple([rebuild(value, done) for value in content])
        done[id(content)] = content, new
    elif isinstance(content, argparse.Namespace):
        rebuild(vars(content), done)
    elif isinstance(content, Dtype) or content in (Dtype, Array, History):
        raise InputError('holds a record that is damaged')
    return new
