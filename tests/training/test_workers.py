"""Loader workers are waited for only for the stated time, and end with their training."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import toy
from torch.distributed import DistBackendError

from spec_mmdet.errors import InputError
from spec_mmdet.training.guards import end_workers
from spec_mmdet.training.running import one_line_errors


class Troubled(toy.Noise):
    """Records which processes load, and fails at the third sample."""

    def __init__(self, folder: Path, trouble: str) -> None:
        super().__init__()
        self.folder, self.trouble = folder, trouble

    def __getitem__(self, index: int) -> dict:
        (self.folder / f'worker_{os.getpid()}').touch()
        if index == 3 and self.trouble == 'hangs':
            time.sleep(3600)
        if index == 3 and self.trouble == 'dies':
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.trouble == 'fills':
            torch.UntypedStorage._share_fd_cpu_ = no_space
        return super().__getitem__(index)


def no_space(*args, **kwargs) -> None:
    """Raise PyTorch's error for a full /dev/shm."""
    raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)')


def troubled(folder: Path, trouble: str, timeout: float):
    (folder / 'seen').mkdir()
    loader = dict(batch_size=2, num_workers=2, persistent_workers=True, dataset=Troubled(folder / 'seen', trouble))
    loader['sampler'] = dict(type='DefaultSampler', shuffle=True)
    hooks = [dict(type='LoaderGuard', timeout=timeout)]
    return toy.runner(folder / 'work', train_dataloader=loader, custom_hooks=hooks)


@pytest.mark.parametrize(
    ('trouble', 'says', 'timeout'),
    [
        ('hangs', 'no data-loader worker has sent', 2),
        ('dies', 'a data-loader worker died', 600),
        ('fills', 'a data-loader worker died.*--shm-size', 600),
    ],
)
def test_a_failing_or_hanging_worker_ends_the_run(tmp_path, capfd, trouble, says, timeout):
    start = time.time()
    with pytest.raises(InputError, match=says), one_line_errors():
        troubled(tmp_path, trouble, timeout).train()
    assert time.time() - start < 60
    said = capfd.readouterr().err
    assert 'Traceback' not in said
    assert trouble != 'fills' or 'unable to allocate shared memory' in said


def fill_shared_memory() -> bool:
    """Give this process a /dev/shm of its own, of 64 KB; return whether this is permitted."""
    libc, new_mounts, recursive, private = ctypes.CDLL(None), 0x20000, 0x4000, 1 << 18
    return not (
        libc.unshare(new_mounts)
        or libc.mount(b'none', b'/', None, recursive | private, None)
        or libc.mount(b'tmpfs', b'/dev/shm', b'tmpfs', 0, b'size=64k')
    )


class Large(toy.Noise):
    def __getitem__(self, index: int) -> dict:
        return dict(super().__getitem__(index), inputs=torch.zeros(3, 100_000))


@pytest.mark.skipif(os.uname().sysname != 'Linux', reason='shared memory is elsewhere')
def test_full_shared_memory_ends_the_run(tmp_path):
    loader = dict(batch_size=2, num_workers=2, dataset=Large(), sampler=dict(type='DefaultSampler', shuffle=True))

    def train() -> None:
        if not fill_shared_memory():
            (tmp_path / 'not allowed').touch()
            return
        hooks = [dict(type='LoaderGuard')]
        toy.runner(tmp_path / 'work', train_dataloader=loader, custom_hooks=hooks).train()

    start = time.time()
    status = toy.status_of(toy.fork(train, tmp_path / 'says'))
    if (tmp_path / 'not allowed').exists():
        pytest.skip('mounting a small /dev/shm is not allowed here; what happens then is tried above')
    says = (tmp_path / 'says').read_text()
    assert status == 1 and '--shm-size' in says and '\n' not in says
    assert time.time() - start < 60
    assert 'Traceback' not in (tmp_path / 'says.log').read_text()


def alive(process: int) -> bool:
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='without /proc, who is alive is not known')
def test_no_worker_outlives_its_training(tmp_path):
    training = os.fork()
    if training == 0:
        troubled(tmp_path, 'hangs', timeout=3600).train()
        os._exit(0)
    workers: list[int] = []
    while len(workers) < 2:
        time.sleep(0.05)
        loading = [int(path.name.removeprefix('worker_')) for path in tmp_path.glob('seen/*')]
        workers = [process for process in loading if process != training]  # which draws a few images itself, at first
    assert len(workers) == 2 and all(map(alive, workers))
    os.kill(training, signal.SIGKILL)
    os.waitpid(training, 0)
    until = time.time() + 10
    while any(map(alive, workers)) and time.time() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_workers_that_are_kept_end_with_their_run(tmp_path):
    loader = toy.loader(num_workers=2, persistent_workers=True)
    runner = toy.runner(tmp_path, epochs=2, train_dataloader=loader)
    runner.train()
    processes = [worker.pid for worker in runner.train_dataloader._iterator._workers]
    start = time.time()
    end_workers(runner)
    assert time.time() - start < 4 and not any(map(alive, processes))


@pytest.mark.parametrize(
    ('error', 'says'),
    [
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), 'with_cp=True'),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'), 'with_cp=True'),
        (RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'), 'with_cp=True'),
        (RuntimeError('CUDNN_BACKEND: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'), 'with_cp=True'),
        (torch.AcceleratorError('CUDA error: out of memory\nCUDA kernel errors might be'), 'with_cp=True'),
        (
            DistBackendError("NCCL error in: NCCLUtils.cpp:93\nLast error:\nCuda failure 2 'out of memory'"),
            'with_cp=True',
        ),
        (
            DistBackendError('[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)'),
            'has not answered',
        ),
        (DistBackendError('NCCL communicator was aborted on rank 1.'), 'another process hangs'),
        (
            DistBackendError('NCCL error in: NCCLUtils.cpp:93, remote process exited or there was a network'),
            'has ended',
        ),
        (DistBackendError('NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error'), 'NCCL_DEBUG=INFO'),
    ],
)
def test_errors_of_gpus_are_one_line(error, says):
    with pytest.raises(InputError, match=says) as stopped, one_line_errors():
        raise error
    line = str(stopped.value)
    assert '\n' not in line and str(error).partition('\n')[0].rstrip('.') in line


def test_other_errors_of_a_gpu_stay_tracebacks():
    with pytest.raises(RuntimeError, match='misaligned'), one_line_errors():
        raise RuntimeError('CUDA error: misaligned address')
