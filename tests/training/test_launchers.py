"""Processes started by torchrun, srun and mpirun: one of them decides, locks and reports. Launchers are stubs."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy
from conftest import CONFIG
from mmengine.config import Config
from mmengine.dist import get_rank
from torch.distributed.elastic.utils.distributed import get_free_port

from spec_mmdet import InputError, processes
from spec_mmdet.checkpoints.reading import load
from spec_mmdet.training.running import train

SCONTROL = '#!/bin/sh\n[ "$1 $2 $3" = "show hostname host1" ] && echo 127.0.0.1\n'


def describe_environment(launcher: str, rank: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher sets in the process of a rank, of two on one machine."""
    names = {
        'pytorch': dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1'),
        'slurm': dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=2, SLURM_NODELIST='host1'),
        'mpi': dict(
            OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=rank, OMPI_COMM_WORLD_SIZE=2, MASTER_ADDR='127.0.0.1'
        ),
    }[launcher]
    return {name: str(value) for name, value in (names | dict(MASTER_PORT=port)).items()}


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> None:
    """Write a stub of Slurm's command that lists the hosts of a job."""
    stub = tmp_path / 'bin' / 'scontrol'
    stub.parent.mkdir()
    stub.write_text(SCONTROL)
    stub.chmod(0o755)
    monkeypatch.setenv('PATH', f'{stub.parent}{os.pathsep}{os.environ["PATH"]}')


ASYNC = 'TORCH_NCCL_ASYNC_ERROR_HANDLING'
GLOO = dict(backend='gloo', timeout=60)


def run_two(launcher: str, folder: Path, action, dist_cfg: dict = GLOO) -> tuple[list[int], list[str]]:
    """Run an action in two connected forks; return their statuses and what each printed."""
    port = get_free_port()

    def connect_and_act(rank: int) -> None:
        for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', ASYNC):
            os.environ.pop(name, None)
        os.environ.update(describe_environment(launcher, rank, port))
        os.environ.setdefault('LOCAL_RANK', '0')
        processes.connect_processes(Config(dict(launcher=launcher, env_cfg=dict(dist_cfg=dist_cfg))))
        action()

    forks = [toy.fork(lambda rank=rank: connect_and_act(rank), folder / f'says_{rank}') for rank in range(2)]
    statuses = [toy.status_of(fork) for fork in forks]
    printed = []
    for rank in range(2):
        says = folder / f'says_{rank}'
        printed.append((says.read_text() if says.exists() else '') + Path(f'{says}.log').read_text())
    return statuses, printed


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_one_process_decides_for_all(launcher, tmp_path, scontrol):
    def act() -> None:
        assert os.environ[ASYNC] == '1'
        chosen = processes.decide_on_main(lambda: f'chosen by {os.getpid()}')
        (tmp_path / f'rank_{get_rank()}').write_text(f'{os.environ["LOCAL_RANK"]} {chosen}')

    assert run_two(launcher, tmp_path, act)[0] == [0, 0]
    first, second = ((tmp_path / f'rank_{rank}').read_text().split(maxsplit=1) for rank in range(2))
    assert (first[0], second[0]) == ('0', '1') and first[1] == second[1]


def test_an_error_of_the_main_process_ends_all_with_one_line(tmp_path):
    def refuse() -> None:
        raise InputError('checkpoint 7 is corrupt')

    statuses, printed = run_two('pytorch', tmp_path, lambda: processes.decide_on_main(refuse))
    assert statuses == [1, 1]
    assert 'checkpoint 7 is corrupt' in printed[0] and printed[1] == ''


def test_a_long_decision_outlasts_the_groups_time_out(tmp_path):
    def wait() -> None:
        processes.decide_on_main(lambda: time.sleep(4))

    assert run_two('pytorch', tmp_path, wait, dict(backend='gloo', timeout=1))[0] == [0, 0]


@pytest.mark.parametrize(
    ('launcher', 'missing'), [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_LOCAL_RANK')]
)
def test_a_launcher_without_its_variables_is_an_error(launcher, missing, monkeypatch):
    for name in os.environ:
        if name.startswith(('SLURM_', 'OMPI_')) or name in ('RANK', 'WORLD_SIZE'):
            monkeypatch.delenv(name)
    select = torch.cuda.set_device
    with pytest.raises(InputError, match=f'--launcher {launcher}: .* {missing} is not set'):
        processes.connect_processes(Config(dict(launcher=launcher)))
    assert torch.cuda.set_device is select


@pytest.mark.parametrize(
    ('key', 'kind'), [('model_wrapper_cfg', 'MMFullyShardedDataParallel'), ('strategy', 'FSDPStrategy')]
)
def test_a_sharded_model_is_refused(tmp_path, key, kind):
    with pytest.raises(InputError, match=f'{key}.*with_cp'):
        train(Config({'work_dir': str(tmp_path), key: dict(type=kind)}), lambda classes: None)


def start(launcher: str, *arguments: str | Path) -> tuple[str, str]:
    """Run a command in two processes; return their outputs, after checking that both succeed."""
    port, running = get_free_port(), []
    for rank in range(2):
        command = [sys.executable, '-m', 'spec_mmdet', *map(str, arguments)]
        environment = os.environ | describe_environment(launcher, rank, port)
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        running.append(subprocess.Popen(command, env=environment, **streams))
    first, second = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], first + second
    return first, second


def test_a_training_is_resumed_under_slurm(tmp_path, scontrol, shapes, trained):
    """With SyncBN in the config, which needs a GPU; then the checkpoint is evaluated."""
    work = tmp_path / 'work'
    common = [CONFIG, '--work-dir', work, '--data', shapes, '--launcher', 'slurm']
    settings = ['train_dataloader.batch_size=2', 'train_dataloader.dataset.indices=4', 'train_cfg.max_epochs=2']
    settings += ['train_dataloader.dataset.pipeline.2.scale=(64,64)', 'default_hooks.checkpoint.interval=1']
    settings += ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None', 'model_wrapper_cfg=None']
    sync_bn = 'model.backbone.norm_cfg.type=SyncBN'
    work.mkdir()
    shutil.copy(trained / 'epoch_1.pth', work)
    (work / 'epoch_2.pth').write_bytes(b'truncated')
    said, silent = start('slurm', 'train', *common, '--resume', '--cfg-options', sync_bn, *settings)
    for note in ('epoch_2.pth', 'BN instead of SyncBN'):
        assert note in said and note not in silent
    assert 'strides' not in said + silent  # of DDP, about kernels of 1 x 1
    assert load(work / 'epoch_2.pth')['meta']['iter'] == 41
    said, silent = start('slurm', 'test', common[0], work / 'epoch_2.pth', *common[1:], '--cfg-options', sync_bn)
    assert 'box AP' in said and 'box AP' not in silent
