"""Processes agree on signals and never wait for each other without limit. Each process is a fork."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import toy
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from torch.distributed.elastic.utils.distributed import get_free_port

from spec_mmdet import processes
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.evaluation.metrics import PatientMetric
from spec_mmdet.training.saving import EVALUATED


def wait_for(path: Path) -> None:
    until = time.time() + 60
    while not path.exists():
        assert time.time() < until, f'no {path}'
        time.sleep(0.01)


@HOOKS.register_module()
class At(Hook):
    """In an iteration of one process, write a file and wait, or send a signal to itself."""

    def __init__(self, iteration: int, rank: int, flag: Path, number: int = 0) -> None:
        self.iteration, self.rank, self.flag, self.number = iteration, rank, Path(flag), number

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.iteration and runner.rank == self.rank:
            self.flag.touch()
            if self.number:
                os.kill(os.getpid(), self.number)
            else:
                time.sleep(60)


def test_a_second_signal_ends_at_once(tmp_path):
    flag = tmp_path / 'flag'
    hooks = [dict(type='At', iteration=6, rank=0, flag=str(flag))]
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        work = tmp_path / f'{first}{second}'
        process = toy.fork(lambda work=work: toy.runner(work, custom_hooks=hooks).train(), tmp_path / 'says')
        wait_for(flag)
        os.kill(process, first)
        time.sleep(0.3)
        assert os.waitpid(process, os.WNOHANG) == (0, 0)  # waits for its iteration
        start = time.time()
        os.kill(process, second)
        assert toy.status_of(process) == 128 + second
        assert time.time() - start < 5
        assert not (work / 'interrupted.pth').exists()
        assert load(work / 'epoch_1.pth')['meta']['iter'] == 4
        flag.unlink()


def two_processes(folder: Path, timeout: float = 60, settings: dict | None = None, **at) -> list[int]:
    """Train by two processes that are connected by gloo."""
    port = get_free_port()

    def train(rank: int) -> None:
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in names.items()})
        torch.cuda.set_device = lambda device: None  # MMEngine calls this also without a GPU, which a fork may not do
        hooks = [dict(type='FiniteGuard')]
        hooks += [dict(type='At', flag=str(folder / 'flag'), **at)] if at else []
        group = dict(dist_cfg=dict(backend='gloo', timeout=timeout))
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        more = dict(launcher='pytorch', env_cfg=group, custom_hooks=hooks, cfg=dict(model_wrapper_cfg=wrapper))
        toy.runner(folder / 'work', **more, **settings or {}).train()

    return [toy.fork(lambda rank=rank: train(rank), folder / f'says_{rank}') for rank in range(2)]


def test_processes_agree_on_a_signal(tmp_path):
    # The second one alone is told in its third iteration: both end after the next iteration, and one saves it.
    processes = two_processes(tmp_path, iteration=3, rank=1, number=int(signal.SIGTERM))
    assert [toy.status_of(process) for process in processes] == [143, 143]
    content = load(tmp_path / 'work' / 'interrupted.pth')
    assert content['meta']['iter'] == 4 and (tmp_path / 'work' / 'last_checkpoint').read_text() == 'interrupted.pth'


@pytest.mark.parametrize('trouble', [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_does_not_answer_ends_the_others(tmp_path, trouble):
    first, second = two_processes(tmp_path, timeout=3, iteration=3, rank=1)
    wait_for(tmp_path / 'flag')
    start = time.time()
    os.kill(second, trouble)
    assert toy.status_of(first) == 1
    assert time.time() - start < 20
    says = (tmp_path / 'says_0').read_text()
    assert 'another process has' in says and '\n' not in says
    if trouble == signal.SIGSTOP:
        os.kill(second, signal.SIGKILL)
    toy.status_of(second)


class SlowScore(PatientMetric, toy.Score):
    """Takes longer than the timeout of the processes."""

    def compute_metrics(self, results: list) -> dict:
        assert len(results) == 4  # one for each batch
        time.sleep(4)
        return super().compute_metrics(results)


def test_an_evaluation_may_take_longer_than_the_timeout(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, 'SOON', 1)
    settings = dict(epochs=2, val_evaluator=dict(type=SlowScore))
    for resume_from in (None, tmp_path / 'work' / 'epoch_2.pth'):  # the second run repeats the last evaluation
        forks = two_processes(tmp_path, timeout=2, settings=dict(settings, resume_from=resume_from))
        assert [toy.status_of(process) for process in forks] == [0, 0]
        (line,) = [line for line in capfd.readouterr().out.splitlines() if 'waiting' in line]
        assert 'process 1' in line and 'evaluation' in line
        assert (tmp_path / 'work' / EVALUATED).read_text() == '2'
        (tmp_path / 'work' / EVALUATED).unlink()
