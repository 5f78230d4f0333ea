"""Checkpoints are read without running their code, and rejected if they do not fit."""

import argparse
import logging
import pickle
import random
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file
from torch import nn

from spec_mmdet import CheckpointGuard, InputError
from spec_mmdet.checkpoints.reading import describe_mismatches, get_state_dict, load


class Payload:
    """Pickles as a call that writes a file: harmless code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def mmengine_checkpoint(**extra):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    history.update(np.float64(3))
    hub = dict(log_scalars={'train/loss': history}, runtime_info=dict(iter=3, score=np.float64(0.5)), resumed_keys={})
    return dict(meta=dict(epoch=1, iter=3, cfg='a = 1'), message_hub=hub, state_dict=dict(w=torch.ones(2)), **extra)


def test_mmengine_checkpoints_are_read(tmp_path):
    torch.save(mmengine_checkpoint(), tmp_path / 'epoch_1.pth')
    checkpoint = CheckpointLoader.load_checkpoint(str(tmp_path / 'epoch_1.pth'), map_location='cpu')
    history = checkpoint['message_hub']['log_scalars']['train/loss']
    assert history.mean() == 2 and history.statistics('max') == 3
    assert checkpoint['message_hub']['runtime_info']['score'] == 0.5


def equal(a: object, b: object) -> bool:
    """Compare two contents, types included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        values = [(value.to_dense() if value.is_sparse else value).to(torch.complex128) for value in (a, b)]
        return (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad) and torch.allclose(*values, equal_nan=True)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, HistoryBuffer):
        return all(map(np.array_equal, a.data, b.data)) and a.mean() == b.mean() and a.max_length == b.max_length
    return a == b


CONTENTS = {
    'weights under "model"': dict(model=dict(w=torch.ones(2), n=torch.nn.Parameter(torch.ones(1)))),
    'weights that are not finite': OrderedDict(w=torch.tensor([torch.nan, torch.inf])),
    'a checkpoint of MMEngine': mmengine_checkpoint(),
    'texts of configs': dict(meta=dict(cfg='a = 1', config='b = 2'), message_hub=dict(runtime_info=dict(cfg='a = 1'))),
    'arguments of a script': dict(args=argparse.Namespace(lr=0.1, output_dir=Path('out')), size=torch.Size([1])),
    'NumPy': dict(a=np.arange(3), b=np.float32(1), c=np.array(['x', 'yy']), d=np.array([True]), e=np.str_('name')),
    'other tensors': dict(a=torch.eye(2).to_sparse(), b=torch.ones(1) * 1j),
    'other containers': dict(
        a={1, 2}, b=slice(1, 2), c=Counter('aab'), d=(1, None), e={(0, 1): b'x'}, f=frozenset({1})
    ),
    'no weights': [1, 'text', None],
}


@pytest.mark.parametrize('name', CONTENTS)
@pytest.mark.parametrize('zipped', [True, False])
def test_mmengine_reads_what_contains_no_code(monkeypatch, tmp_path, name, zipped):
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', raising=False)
    path = tmp_path / 'file.pth'
    torch.save(CONTENTS[name], path, _use_new_zipfile_serialization=zipped)
    content = CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert equal(content, torch.load(path, 'cpu', weights_only=False))
    if name == 'other tensors':
        with pytest.raises(InputError):
            load(path)


def test_mmengines_own_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'absent.pth'))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    touched = tmp_path / 'touched'
    pickle.loads(pickle.dumps(Payload(touched)))
    assert touched.exists()  # the payload works if code is run
    touched.unlink()
    torch.save(mmengine_checkpoint(payload=Payload(touched)), tmp_path / 'code.pth')
    with pytest.raises(InputError, match='was not run'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'code.pth'))
    assert not touched.exists()


def test_getattr_reaches_nothing_but_statistics(tmp_path):
    class Getattr:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save(dict(state_dict={}, method=Getattr()), tmp_path / 'getattr.pth')
    with pytest.raises(InputError):
        load(tmp_path / 'getattr.pth')


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(InputError, match='no such file'):
        load(tmp_path / 'absent.pth')
    torch.save(mmengine_checkpoint(), tmp_path / 'whole.pth')
    whole = (tmp_path / 'whole.pth').read_bytes()
    broken = tmp_path / 'broken.pth'
    rng = random.Random(0)
    for content in [
        b'',
        b'hello',
        b'{"a": 1}',
        rng.randbytes(1000),
        *(whole[: rng.randrange(len(whole))] for _ in range(50)),
    ]:
        broken.write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(InputError, match='broken.pth'):
                load(broken, mmap=mmap)


def runner(model, training=False, resume=False):
    """The part of a Runner that the guard reads."""
    return SimpleNamespace(
        model=model, _load_from='some.pth', _resume=resume, _train_loop=object() if training else {},
        logger=logging.getLogger('runner'),
    )  # fmt: skip


def test_the_guard_requires_every_weight_except_new_heads(caplog):
    caplog.set_level(logging.INFO)
    model = torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2), head=torch.nn.Linear(2, 3)))
    guard, weights = CheckpointGuard(), model.state_dict()
    modes = dict(test=runner(model), resume=runner(model, True, True), fine_tune=runner(model, True))
    for mode in modes.values():
        guard.after_load_checkpoint(mode, dict(state_dict=weights))
        plain = {f'module.{k}': v for k, v in weights.items()}
        guard.after_load_checkpoint(mode, plain)
        assert plain['state_dict'].keys() == weights.keys()  # MMEngine's EMAHook needs it
        for useless in (dict(model=weights), dict(state_dict={}), [1], dict(state_dict=dict(epoch=3))):
            with pytest.raises(InputError, match='some.pth: .* no weights'):
                guard.after_load_checkpoint(mode, useless)
        with pytest.raises(InputError, match=r'1 missing \(backbone.bias\)'):
            guard.after_load_checkpoint(mode, {k: v for k, v in weights.items() if k != 'backbone.bias'})
        with pytest.raises(InputError, match=r'1 unknown \(backbone.other\)'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.other': torch.ones(1)})
        with pytest.raises(InputError, match='backbone.weight'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.weight': torch.ones(3, 2)})
        with pytest.raises(InputError, match=r'NaN .*head.bias'):
            guard.after_load_checkpoint(mode, {**weights, 'head.bias': torch.tensor([1, torch.nan, 1])})
        with pytest.raises(InputError, match='made with conditioning'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.blocks.0.attn.correction.lam': torch.tensor(10.0)})
    for name, other_head in (('fewer', {}), ('others', {'head.weight': torch.ones(7, 2), 'head.bias': torch.ones(7)})):
        loaded = {k: v for k, v in weights.items() if 'backbone' in k} | other_head
        for mode in ('test', 'resume'):
            with pytest.raises(InputError, match='head.weight'):
                guard.after_load_checkpoint(modes[mode], dict(loaded)), name
        guard.after_load_checkpoint(modes['fine_tune'], loaded)
    assert loaded['state_dict']['head.weight'].shape == (3, 2)  # the model's own, of which MMEngine does not warn
    assert '2 tensors of the heads' in caplog.text


def test_quoted_contents_of_a_file_stay_on_one_line():
    with pytest.raises(InputError) as refused:
        get_state_dict({}, 'checkpoint a\nb\x1b[2K\ud800 ü')
    assert str(refused.value).startswith(r'checkpoint a\nb\x1b[2K\ud800 ü: contains no weights')


def test_integers_are_no_weights_and_second_names_are_known(tmp_path):
    model = torch.nn.BatchNorm1d(2)
    assert describe_mismatches(model, model.state_dict()) == ''
    torch.save(dict(model.state_dict(), again=model.weight, other=model.weight.clone()), tmp_path / 'aliases.pth')
    assert describe_mismatches(model, load(tmp_path / 'aliases.pth', mmap=True)) == '1 unknown (other)'
    weights = {name: value.long() for name, value in model.state_dict().items()}
    assert describe_mismatches(model, weights).startswith('4 with a wrong dtype (weight, bias, ')


def test_mmengine_reads_safetensors(tmp_path):
    weights = {'layer.weight': torch.randn(3, 4), 'layer.bias': torch.randn(3).half()}
    save_file(weights, tmp_path / 'model.safetensors')
    found = CheckpointLoader.load_checkpoint(str(tmp_path / 'model.safetensors'), 'cpu')['state_dict']
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_averaged_counts_of_batches_are_integers_again():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weights = {name: value / 2 for name, value in model.state_dict().items()}
    assert weights['1.num_batches_tracked'].is_floating_point()
    assert describe_mismatches(model, weights)
    assert not describe_mismatches(model, get_state_dict(weights, 'mean'))
