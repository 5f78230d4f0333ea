"""Connect the processes of distributed training, make decisions in the main one, and disconnect them."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from threading import Timer
from typing import TypeVar

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size, init_dist, is_distributed, is_main_process
from mmengine.utils.dl_utils import set_multi_processing

from .errors import InputError

T = TypeVar('T')

PATIENCE = timedelta(hours=12)  # timeout of waiting for the main process, which may evaluate many images
SOON = 30  # seconds of waiting without a message
STARTERS = dict(pytorch='torchrun', slurm='srun', mpi='mpirun')

_waiting: list[torch.distributed.ProcessGroup] = []


def connect_processes(cfg: Config) -> None:
    """Initialise the process group from ``launcher`` and ``env_cfg`` of a config, if there is a launcher.

    Afterwards :func:`mmengine.dist.is_main_process` is valid, and MMEngine's runner uses this group. Without a GPU the
    processes communicate by gloo, and the config's model wrapper, DDP if it has none, gets a model on the CPU.

    Raises:
        InputError: if the launcher's environment variables are not set.
    """
    if cfg.launcher == 'none':
        return
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False)  # the runner's own
        wrapper['find_unused_parameters'] = cfg.get('find_unused_parameters', False)
        cfg.model_wrapper_cfg = {**wrapper, **(cfg.get('model_wrapper_cfg') or {}), 'device_ids': None}
    if is_distributed():
        return
    env = cfg.get('env_cfg') or {}
    if 'OMPI_COMM_WORLD_LOCAL_RANK' in os.environ and cfg.launcher == 'mpi':
        os.environ['LOCAL_RANK'] = os.environ['OMPI_COMM_WORLD_LOCAL_RANK']  # init_dist leaves it unset
    os.environ.setdefault('TORCH_NCCL_ASYNC_ERROR_HANDLING', '1')  # a collective that times out ends the process
    set_multi_processing(**env.get('mp_cfg', {}), distributed=True)  # or init_dist would choose another start method
    group, select_gpu = env.get('dist_cfg', {}), torch.cuda.set_device
    if on_cpu:
        group = {**group, 'backend': 'gloo'}
        torch.cuda.set_device = lambda device: None  # init_dist calls it whatever the backend is
    try:
        init_dist(cfg.launcher, **group)
    except KeyError as error:
        name = re.search('[A-Z][A-Z_]+', str(error))[0]
        raise InputError(
            f'--launcher {cfg.launcher}: the environment variable {name} is not set. Set it, or start the processes '
            f'with {STARTERS[cfg.launcher]}'
        ) from error
    finally:
        torch.cuda.set_device = select_gpu
    get_waiting_group()


def tell(line: str) -> None:
    """Print a line on stderr, only in the main process."""
    if is_main_process():
        print(line, file=sys.stderr)


def get_waiting_group() -> torch.distributed.ProcessGroup:
    """Return the group of all processes whose timeout is :data:`PATIENCE`."""
    if not _waiting:
        _waiting.append(torch.distributed.new_group(timeout=PATIENCE, backend='gloo'))
    return _waiting[0]


def start_max(number: torch.Tensor) -> torch.distributed.Work:
    """Start replacing a CPU tensor by its maximum over all processes; return the handle to wait for."""
    return torch.distributed.all_reduce(
        number, torch.distributed.ReduceOp.MAX, group=get_waiting_group(), async_op=True
    )


@cache  # prints once
def announce(what: str) -> None:
    print(f'process {get_rank()}: waiting for process 0 ({what})', flush=True)


def decide_on_main(decide: Callable[[], T], what: str = 'checks and files') -> T:
    """Run a function only in the main process, and return its result in all processes.

    The others wait up to :data:`PATIENCE`, whatever the timeout of the run's process group is. If the function raises
    an exception, the main process raises it and the others exit with status 1 and without a message.

    Args:
        decide: a function without arguments whose result can be pickled.
        what: what the others wait for; they print it once.
    """
    if get_world_size() == 1:
        return decide()
    result, error = None, None
    if is_main_process():
        try:
            result = decide()
        except BaseException as raised:
            error = raised
    message = [result, error is not None]
    timer = Timer(SOON, announce, [what])
    if not is_main_process():
        timer.start()
    try:
        torch.distributed.broadcast_object_list(message, src=0, group=get_waiting_group())
    finally:
        timer.cancel()
    result, failed = message
    if failed:
        leave_group()
        if error is not None:
            raise error
        sys.exit(1)
    return result


def leave_group() -> None:
    """Wait for the other processes and destroy the process group, if there is one."""
    if is_distributed():
        # Without the barrier the first process to leave closes connections that others still use. The runner, which is
        # part of a reference cycle, would keep the group alive, and gloo's threads can abort a process that exits.
        gc.collect()
        decide_on_main(lambda: None)
        _waiting.clear()
        torch.distributed.destroy_process_group()
