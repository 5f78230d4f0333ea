# ruff: noqa: E402
"""Train and evaluate with two processes on simulated GPUs whose "nccl" rejects CPU tensors; one gets SIGTERM."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pretend_gpu

pretend_gpu.install()

import toy
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from spec_mmdet.evaluation.metrics import PatientMetric


class Score(PatientMetric, toy.Score):
    """Wait for the first process as COCO metrics do."""


@HOOKS.register_module()
class SignalAt(Hook):
    """Send the second process SIGTERM in the third iteration of the second epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        assert next(runner.model.parameters()).is_cuda
        if runner.iter == 6 and runner.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(rank: int, port: int, folder: Path) -> None:
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    pretend_gpu.use_nccl()
    group = dict(dist_cfg=dict(backend='nccl', timeout=60))
    hooks = [dict(type='FiniteGuard'), dict(type='SignalAt')]
    settings = dict(launcher='pytorch', env_cfg=group, custom_hooks=hooks, val_evaluator=dict(type=Score))
    toy.runner(folder / 'work', **settings).train()


if __name__ == '__main__':
    folder = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [toy.fork(lambda rank=rank: train(rank, port, folder), folder / f'says_{rank}') for rank in range(2)]
    statuses = [toy.status_of(process) for process in processes]
    for path in sorted(folder.glob('says_*')):
        print(path.name, path.read_text()[-3000:])
    print(json.dumps(statuses))
