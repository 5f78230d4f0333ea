"""Checkpoints are read without running their code, and refused where they do not fit."""

import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from spec_mmdet import CheckpointGuard, InputError
from spec_mmdet.checkpoints.reading import describe_mismatches, get_state_dict, load


class Payload:
    """Pickles as a call that writes a file: code, if harmless."""

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


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    touched = tmp_path / 'touched'
    pickle.loads(pickle.dumps(Payload(touched)))
    assert touched.exists()  # the payload does work where code is run
    touched.unlink()
    torch.save(mmengine_checkpoint(payload=Payload(touched)), tmp_path / 'code.pth')
    with pytest.raises(InputError, match='only running code from the file could read; it was not run'):
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
    """As much of a Runner as the guard looks at."""
    return SimpleNamespace(model=model, _load_from='some.pth', _resume=resume, _train_loop=object() if training else {})


def test_guard_wants_every_weight_but_not_a_new_training_s_heads():
    model = torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2), head=torch.nn.Linear(2, 3)))
    guard, weights = CheckpointGuard(), model.state_dict()
    modes = dict(test=runner(model), resume=runner(model, True, True), fine_tune=runner(model, True))
    for mode in modes.values():
        guard.after_load_checkpoint(mode, dict(state_dict=weights))
        guard.after_load_checkpoint(mode, {f'module.{k}': v for k, v in weights.items()})
        for useless in (dict(model=weights), dict(state_dict={}), [1], dict(state_dict=dict(epoch=3))):
            with pytest.raises(InputError, match='some.pth: holds no weights'):
                guard.after_load_checkpoint(mode, useless)
        with pytest.raises(InputError, match=r'1 missing \(backbone.bias\)'):
            guard.after_load_checkpoint(mode, {k: v for k, v in weights.items() if k != 'backbone.bias'})
        with pytest.raises(InputError, match=r'1 unknown \(backbone.other\)'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.other': torch.ones(1)})
        with pytest.raises(InputError, match='another shape'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.weight': torch.ones(3, 2)})
        with pytest.raises(InputError, match=r'not finite .head.bias.'):
            guard.after_load_checkpoint(mode, {**weights, 'head.bias': torch.tensor([1, torch.nan, 1])})
        with pytest.raises(InputError, match='made with conditioning'):
            guard.after_load_checkpoint(mode, {**weights, 'backbone.blocks.0.attn.correction.lam': torch.tensor(10.0)})
    for name, other_head in (('fewer', {}), ('others', {'head.weight': torch.ones(7, 2), 'head.bias': torch.ones(7)})):
        loaded = {k: v for k, v in weights.items() if 'backbone' in k} | other_head
        guard.after_load_checkpoint(modes['fine_tune'], loaded)
        for mode in ('test', 'resume'):
            with pytest.raises(InputError, match='head.weight'):
                guard.after_load_checkpoint(modes[mode], loaded), name


def test_what_is_quoted_of_a_file_stays_within_the_line():
    with pytest.raises(InputError) as refused:
        get_state_dict({}, 'checkpoint a\nb\x1b[2K\ud800 ü')
    assert str(refused.value).startswith(r'checkpoint a\nb\x1b[2K\ud800 ü: holds no weights')


def test_integers_are_no_weights():
    model = torch.nn.BatchNorm1d(2)
    assert describe_mismatches(model, model.state_dict()) == ''
    weights = {name: value.long() for name, value in model.state_dict().items()}
    assert describe_mismatches(model, weights).startswith('4 of another kind of number (weight, bias, ')
