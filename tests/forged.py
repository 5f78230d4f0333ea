"""Write malicious checkpoints: each would create a file, read foreign memory, or fill the memory."""

import codecs
import ctypes
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file


class Call:
    """Pickles as a call: pickle itself runs it as code."""

    def __init__(self, function: Callable, *args, state=None) -> None:
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call

    def __call__(self) -> None:
        """Lets a call stand where a function is called."""


def touch(path: Path) -> str:
    """Return Python code that leaves a trace."""
    return f'import pathlib; pathlib.Path({str(path)!r}).touch()'


def replaced(content: dict, old: bytes | None, new: bytes) -> bytes:
    """Return what torch.save writes for the content, with other bytes in or instead of its pickle."""
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
    """Return an array as NumPy pickles it, with any bytes."""
    rebuild = np.zeros(1).__reduce__()[0]
    return Call(rebuild, np.ndarray, (0,), b'b', state=(1, shape, dtype, False, data))


def nested(levels: int) -> bytes:
    """Return the pickle of an empty list in a list in a list ..."""
    return b'\x80\x02' + b']' * levels + b'a' * (levels - 1) + b'.'


def repeated(times: int) -> bytes:
    """Write a checkpoint whose directory has one record under many names, an uncompressed zip bomb."""
    file = io.BytesIO()
    torch.save([torch.zeros(1 << 20)] + [torch.zeros(1) for _ in range(times)], file)
    with zipfile.ZipFile(file, 'a') as archive:
        large = next(entry for entry in archive.infolist() if entry.filename.endswith('data/0'))
        for entry in archive.infolist():
            if '/data/' in entry.filename:
                entry.header_offset, entry.file_size, entry.CRC = large.header_offset, large.file_size, large.CRC
                entry.compress_size = entry.file_size
        archive.comment = b'changed'  # forces the directory to be written
    return file.getvalue()


# Contents no worse than text that MMEngine would run as Python, or than parts that nobody reads: may be accepted.
HARMLESS = {
    # A training that resumes from these must reject them, as its test does:
    *('a place within the epoch that lies', 'a place without end', 'an optimiser that lies', 'schedules that lie'),
    'gradients that lie',
    'methods of a dict replaced',  # restored
    'a storage larger than its record',  # mapped, it ends with the file
    'integers for weights',  # changes numbers for MMDetection's API; this project's commands reject it
    'doubled without end',  # small unless somebody writes it out
}


def is_harmless(name: str) -> bool:
    """Return whether a forged file may be accepted."""
    return name in HARMLESS or name.startswith('config ')


def write_forged(folder: Path, good: dict, trace: Path) -> dict[str, Path]:
    """Write the forged files, each an intact checkpoint of a detector except for the forged part.

    Args:
        folder: to write to.
        good: the content of a checkpoint of MMEngine.
        trace: the file that their code would create.

    Returns:
        Paths by the forged part. Names that begin with "config" contain nothing worse than text that MMEngine runs.
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
    weights, first = dict(good['state_dict']), next(iter(good['state_dict']))
    wide = torch.zeros(1).expand(1 << 33)
    twice = [[0] * 9]
    for _ in range(60):
        twice = [twice, twice]
    scripts = folder / 'base.py'
    scripts.write_text(code)

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
        'a quantized tensor': dict(good, extra=torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)),
        'a tensor in 8 bits': dict(good, state_dict=weights | {first: torch.zeros(4).to(torch.float8_e5m2)}),
        'a tensor without end': dict(good, state_dict=weights | {first: wide}),
        'a tensor without end converted': dict(
            good, extra=Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, wide, torch.float64, 'cpu', False)
        ),
        'counting without end': dict(good, extra=Call(Counter, wide)),
        'bytes without end': dict(good, extra=Call(bytearray, 1 << 36)),
        'a storage without end': dict(good, extra=Call(torch.FloatTensor, 1 << 36)),
        'text in a slow coding': dict(good, extra=Call(codecs.encode, '\u0101' * 1_000_000, 'punycode')),
        'doubled without end': dict(good, extra=twice),
        'weights that are not finite': dict(good, state_dict=weights | {first: weights[first] * torch.nan}),
        'complex weights': dict(good, state_dict=weights | {first: weights[first] * 1j}),
        'integers for weights': dict(good, state_dict=weights | {first: weights[first].long()}),
        'numbers for names': dict(good, state_dict=dict(enumerate(weights.values()))),
        'tuples for names': dict(good, state_dict={(name, 0): value for name, value in weights.items()}),
        'text for what is known of them': dict(good, meta='epoch 1'),
        'text for weights': dict(good, state_dict=dict.fromkeys(weights, 'text')),
        'a list for weights': dict(good, state_dict=list(weights.values())),
        'nothing': None,
        'a number': 1,
        'no block and many': dict(state_dict=weights | {'backbone.blocks.99999999.norm1.weight': torch.zeros(4)}),
        'a place within the epoch that lies': dict(good, meta=dict(meta, iter_in_epoch='1', iters_per_epoch=[])),
        'a place without end': dict(good, meta=dict(meta, iter=1 << 70)),
        'an optimiser that lies': dict(good, optimizer=dict(state=[1], param_groups='text')),
        'schedules that lie': dict(good, param_schedulers=[1, 2]),
        'gradients that lie': dict(good, gradients=dict.fromkeys(weights, torch.zeros(3, 1))),
        'config of the resumed run': dict(good, meta=dict(meta, config=code)),
        'config by base': dict(
            good, message_hub={}, meta=dict(meta, config=f'_base_ = {str(scripts)!r}', cfg=f'_base_ = {str(scripts)!r}')
        ),  # fmt: skip
        'config by import': dict(good, meta=dict(meta, cfg='custom_imports = dict(imports=["antigravity"])')),
        'config by placeholder': dict(good, meta=dict(meta, cfg=f'a = {{{{ exec({code!r}) }}}}')),
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
    legacy = io.BytesIO()
    torch.save(dict(w=torch.zeros(1)), legacy, _use_new_zipfile_serialization=False)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode='w') as archive:
        for part in ('storages', 'tensors', 'pickle'):
            (folder / part).write_bytes(pickle.dumps(with_code))
            archive.add(folder / part, part)
            (folder / part).unlink()
    files |= {
        'a tar of old': tar.getvalue(),
        'an old storage larger than the file': legacy.getvalue().replace(b'K\x01N', b'J\x00\x00\x00\x7fN'),
        'one record many times': repeated(64),
        'an empty file': b'',
        'a page of the web': b'<!DOCTYPE html><html>',
        'cut in the middle': lying.getvalue()[: len(lying.getvalue()) // 2],
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
    paths['a link to itself'] = folder / 'a_link_to_itself.pth'
    paths['a link to itself'].symlink_to('a_link_to_itself.pth')
    paths['a folder'] = folder / 'a_folder.pth'
    paths['a folder'].mkdir()
    return paths
