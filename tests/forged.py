"""Checkpoints of someone who means harm: each would touch a file, read memory that is not its own, or fill it."""

import ctypes
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file


class Call:
    """Pickles as a call: code, when it is unpickled by pickle itself."""

    def __init__(self, function: Callable, *args, state=None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call

    def __call__(self) -> None:
        """So that a call may stand where a function is called."""


def touch(path: Path) -> str:
    """Python that leaves a trace."""
    return f'import pathlib; pathlib.Path({str(path)!r}).touch()'


def replaced(content: dict, old: bytes | None, new: bytes) -> bytes:
    """What torch.save writes of the content, with other bytes in its pickle, or in the place of all of it."""
    whole, forged = io.BytesIO(), io.BytesIO()
    torch.save(content, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(forged, 'w') as target:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith('/data.pkl'):
                assert old is None or old in data
                data = new if old is None else data.replace(old, new)
            target.writestr(entry.filename, data)
    return forged.getvalue()


def array(dtype: np.dtype, shape: tuple, data: bytes) -> Call:
    """An array as NumPy pickles it, whatever its bytes are."""
    rebuild = np.zeros(1).__reduce__()[0]
    return Call(rebuild, np.ndarray, (0,), b'b', state=(1, shape, dtype, False, data))


def nested(levels: int) -> bytes:
    """The pickle of an empty list in a list in a list ..."""
    return b'\x80\x02' + b']' * levels + b'a' * (levels - 1) + b'.'


def write_forged(folder: Path, good: dict, trace: Path) -> dict[str, Path]:
    """Write the forged files, each a detector's whole checkpoint but for what is forged.

    Args:
        folder: where to.
        good: the content of a checkpoint of MMEngine.
        trace: the file that their code would touch.

    Returns:
        Paths by what is forged. Those whose names begin with "config" hold nothing worse than text that MMEngine runs.
    """
    code, address = touch(trace), struct.pack('<Q', 0x4141414141414141)
    hub, meta = good['message_hub'], good['meta']

    def history(values: object) -> dict:
        buffer = HistoryBuffer([1.0], [1])
        buffer._log_history = values
        return dict(good, message_hub=dict(hub, log_scalars={'train/loss': buffer}))

    with_code = dict(good, extra=Call(os.system, f'touch {trace}'))
    torchscript = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), torchscript)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, 'w', zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr('archive/data.pkl', pickle.dumps(good['meta'], 2))
        bomb.writestr('archive/version', '3\n')
        bomb.writestr('archive/data/0', bytes(1 << 26))
    lying = io.BytesIO()
    torch.save(dict(w=torch.zeros(4)), lying)
    save_file(dict(w=torch.zeros(4)), folder / 'whole.safetensors')
    tensors = (folder / 'whole.safetensors').read_bytes()
    (folder / 'whole.safetensors').unlink()
    shadowed = good['state_dict'].copy()
    shadowed.keys = torch._utils._rebuild_parameter

    contents = {
        'os.system': with_code,
        'eval': dict(good, extra=Call(eval, code)),
        'code in the meta': dict(good, meta=dict(meta, extra=Call(exec, code))),
        'code among the weights': dict(good, state_dict={'w': Call(exec, code)}),
        'a method by getattr': dict(good, extra=Call(getattr, HistoryBuffer, '__init__')),
        'getattr of getattr': dict(good, extra=Call(Call(getattr, HistoryBuffer, 'mean'), code)),
        'import by name': dict(good, extra=Call(__import__, 'antigravity')),
        'an array of objects': dict(good, extra=array(np.dtype('O'), (1,), address)),
        'an array of records with objects': dict(good, extra=array(np.dtype([('a', 'O')]), (1,), address)),
        'an object as a scalar': dict(good, extra=Call(np.float64(0).__reduce__()[0], np.dtype('O'), address)),
        'objects as a history': history(array(np.dtype('O'), (1,), address)),
        'an array without end': dict(good, extra=array(np.dtype('f8'), (1 << 40,), address)),
        'an array of negative length': dict(good, extra=array(np.dtype('f8'), (-1, -1), address)),
        'no array for a history': history('[1]'),
        'a file for an array': dict(good, extra=Call(np.memmap, str(trace), 'u1', 'w+', 0, (1,))),
        'an array from a file': dict(good, extra=Call(np.load, str(trace))),
        'a library loaded': dict(good, extra=Call(ctypes.CDLL, str(trace))),
        'torch.load again': dict(good, extra=Call(torch.load, str(trace))),
        'methods of a dict replaced': dict(good, state_dict=shadowed),
        'a tensor without content': dict(good, state_dict=dict(w=torch.zeros(4, device='meta'))),
        'a sparse tensor': dict(good, state_dict=dict(w=torch.zeros(4).to_sparse())),
        'config of the resumed run': dict(good, meta=dict(meta, config=code)),
        'config in the meta': dict(good, message_hub={}, meta=dict(meta, cfg=code)),
        'config in the message hub': dict(
            good, message_hub=dict(hub, runtime_info=dict(hub['runtime_info'], cfg=code)), meta=dict(meta, cfg=code)
        ),
    }
    files = {
        'nested without end': replaced(good, None, nested(20_000)),
        'os.system in the old format': (with_code, False),
        'TorchScript': torchscript.getvalue(),
        'a bare pickle': pickle.dumps(with_code),
        'a zip bomb': compressed.getvalue(),
        'a tensor larger than its storage': replaced(dict(w=torch.zeros(4)), b'K\x00K\x04\x85', b'K\x00M\xff\xff\x85'),
        'a storage larger than its record': replaced(dict(w=torch.zeros(4)), b'K\x04t', b'J\xff\xff\xff\x7ft'),
        'an offset behind its storage': replaced(dict(w=torch.zeros(4)), b'K\x00K\x04\x85', b'M\xff\xffK\x04\x85'),
        'a tensor of negative size': replaced(dict(w=torch.zeros(4)), b'K\x00K\x04\x85', b'K\x00J\xff\xff\xff\xff\x85'),
    }
    paths = {}
    for name, content in (contents | files).items():
        path = paths[name] = folder / f'{name.replace(" ", "_")}.pth'
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, tuple):
            torch.save(content[0], path, _use_new_zipfile_serialization=content[1])
        else:
            torch.save(content, path)
    paths['a header that lies'] = folder / 'a_header_that_lies.safetensors'
    paths['a header that lies'].write_bytes(tensors.replace(b'[4]', b'[9]'))
    paths['a header without end'] = folder / 'a_header_without_end.safetensors'
    paths['a header without end'].write_bytes(struct.pack('<Q', 1 << 62) + tensors[8:])
    return paths
