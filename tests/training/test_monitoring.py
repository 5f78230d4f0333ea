"""A failing monitor does not end a training, and truncated records are read."""

import errno
import fcntl
import logging
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import toy
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from spec_mmdet import InputError
from spec_mmdet.models.xcit import SpecXCiT
from spec_mmdet.training import hooks
from spec_mmdet.training.results import read_scalars
from spec_mmdet.training.resume import lock_folder
from spec_mmdet.training.runners import WholeConfigRunner
from spec_mmdet.training.saving import stop_on_signals
from spec_mmdet.training.terminal import Terminal


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_a_monitor_that_fails_warns_once(tmp_path, monkeypatch):
    def fail(*args, **kwargs) -> None:
        raise torch.linalg.LinAlgError('svd did not converge')

    monkeypatch.setattr(hooks, 'measure', fail)
    monkeypatch.setattr(toy.Line, 'backbone', torch.nn.Identity(), raising=False)
    run = toy.runner(tmp_path, custom_hooks=[dict(type='ConditioningHook', interval=1)])
    records = Records()
    MMLogger.get_current_instance().addHandler(records)
    run.train()
    assert run.iter == 16
    (line,) = [line for line in records.lines if 'svd did not converge' in line]


@pytest.mark.parametrize('error', [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, error):
    def refuse(*args) -> None:
        raise OSError(error, 'no locks')

    monkeypatch.setattr(fcntl, 'lockf', refuse)
    with lock_folder(tmp_path / 'work'):
        assert (tmp_path / 'work').is_dir()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / 'work') in line and 'no locks' in line


def test_a_truncated_record(tmp_path, capsys):
    folder = tmp_path / '1' / 'vis_data'
    folder.mkdir(parents=True)
    file = folder / 'scalars.json'
    file.write_text('{"loss": 2.0, "iter": 1}\n{"loss": 1.0, "iter": 2}\n{"loss": 0.')
    assert [entry['loss'] for entry in read_scalars(tmp_path)] == [2.0, 1.0]
    assert read_scalars(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    file.write_text('{"loss": 2.0, "i\n{"loss": 1.0, "iter": 2}\n')
    with pytest.raises(InputError, match='line 1'):
        read_scalars(tmp_path)


class Detector(toy.Line):
    """Fits a line; its backbone is only monitored."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SpecXCiT(
            'nano_12', 16, dict(type='identity', lam=1.0), norm_cfg=dict(type='BN')
        ).requires_grad_(False)


@pytest.mark.parametrize('processes', [1, 2])
def test_a_record_is_the_same_in_a_process_of_its_own(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(hooks, 'get_world_size', lambda: processes)
    batch = dict(inputs=torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)))
    run = toy.runner(tmp_path, model=dict(type=Detector), custom_hooks=[])
    monkeypatch.setattr(run.model, 'data_preprocessor', torch.nn.Identity())
    written = {}
    monkeypatch.setattr(run.visualizer, 'add_scalars', lambda values, step: written.update({step: values}))
    hook = hooks.ConditioningHook(interval=100)
    hook.before_train(run)
    monkeypatch.setattr(hook, 'is_last_train_iter', lambda runner: False)
    hook.after_train_iter(run, 0, batch)
    assert (hook.pending is not None) == (len(written) == 0) == (processes == 2)  # the training does not wait
    hook.after_train(run)
    expected, _ = hooks.compute_rows(1, run.model.backbone, batch['inputs'][:1], 1)
    assert len(expected) == 12 * 4
    rows = [line.split(',') for line in (tmp_path / 'conditioning.csv').read_text().splitlines()[1:]]
    assert [row[:3] for row in rows] == [[str(value) for value in row[:3]] for row in expected]
    for row, other in zip(rows, expected):
        assert [float(value) for value in row[3:6]] == pytest.approx(other[3:6], rel=1e-4)
    assert written[1]['conditioning/kappa_J'] > 1 and not hook.failed


def test_each_run_has_its_own_visualiser(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, 'Runner', WholeConfigRunner)
    shared = dict(type='Visualizer', name='visualizer', vis_backends=[dict(type='LocalVisBackend')])
    first, second = (toy.runner(tmp_path / name, visualizer=deepcopy(shared)) for name in 'ab')
    for run in (first, second):
        run.visualizer.add_scalar('loss', 1.0)
        (file,) = Path(run.work_dir).glob('*/vis_data/scalars.json')
        assert file.read_text().count('loss') == 1


def test_a_training_in_a_thread(tmp_path):
    def train() -> None:
        with stop_on_signals():
            toy.runner(tmp_path, epochs=1).train()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert (tmp_path / 'epoch_1.pth').exists()


def test_undefined_metrics_are_explained(capsys):
    metrics = {f'coco/bbox_mAP{size}': 0.25 for size in ('', '_50', '_75', '_s', '_m')} | {'coco/bbox_mAP_l': -1.0}
    Terminal().after_test_epoch(None, metrics)
    out = capsys.readouterr().out
    assert out.split('box AP')[1].split()[:6] == ['0.250'] * 5 + ['-']
    assert '\nlarge: undefined (-1)' in out and '-1.000' not in out
    Terminal().after_test_epoch(None, metrics | {'coco/bbox_mAP_l': 0.5})
    assert 'undefined' not in capsys.readouterr().out


@pytest.mark.parametrize('window', ['global', 'epoch', 9])
def test_a_limited_history_changes_no_logged_number(tmp_path, window):
    custom = [dict(data_src='loss', log_name='other', method_name='mean', window_size=window)]
    hooks = dict(
        logger=dict(type='LoggerHook', interval=1),
        checkpoint=dict(type='AtomicCheckpointHook', interval=1),
        history=dict(type='HistoryLimit'),
    )

    def train(name: str, limited: bool, **settings) -> tuple[list[tuple], Runner]:
        run = toy.runner(
            tmp_path / name,
            default_hooks=hooks if limited else {key: hooks[key] for key in ('logger', 'checkpoint')},
            log_processor=dict(window_size=3, custom_cfg=deepcopy(custom)),
            **settings,
        )
        run.train()
        records = [record for record in read_scalars(tmp_path / name) if 'loss' in record]
        return [(record['iter'], record['loss'], record['other'], record['lr']) for record in records], run

    expected, _ = train('complete', False)
    limited, run = train('limited', True)
    assert limited == expected and len(expected) == 16
    lengths = {name: len(history.data[0]) for name, history in run.message_hub.log_scalars.items()}
    longest = {'global': 4, 'epoch': 4, 9: 9}[window]  # a validation has 4 iterations
    assert lengths['train/time'] == lengths['train/lr'] == lengths['val/time'] == longest
    assert lengths['train/loss'] == (16 if window == 'global' else longest)
    resumed, _ = train('resumed', True, resume_from=tmp_path / 'limited' / 'epoch_3.pth')
    assert resumed == expected[12:]
