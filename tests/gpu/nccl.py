# ruff: noqa: E402
"""Train a detector with two processes on simulated GPUs; the backend "nccl" rejects CPU tensors.

Batch normalisation is synchronised. The detector is evaluated after the first epoch; then one process gets SIGTERM.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pretend_gpu

pretend_gpu.install()

import torch
import toy
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.distributed.elastic.utils.distributed import get_free_port

from spec_mmdet.commands import run
from spec_mmdet.models.xcit import SpecXCiT
from spec_mmdet.processes import connect_processes


@HOOKS.register_module()
class SignalAt(Hook):
    """Send the second process SIGTERM in the third iteration."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        assert next(runner.model.parameters()).is_cuda
        if runner.iter == 2 and runner.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def run_backbone(norm: str, images: torch.Tensor) -> SpecXCiT:
    """Return a backbone after a forward and backward pass."""
    torch.manual_seed(0)
    model = SpecXCiT(dict(dim=32, depth=4, num_heads=4), norm_cfg=dict(type=norm)).cuda().train()
    sum(y.square().mean() for y in model(images.cuda())).backward()
    return model


def compare_sync_bn(rank: int) -> None:
    """Compare gradients and running statistics of two images per process with those of four in one."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole, half = run_backbone('BN', images), run_backbone('SyncBN', images[2 * rank : 2 * rank + 2])
    for (name, expected), own in zip(whole.named_parameters(), half.parameters(), strict=True):
        torch.distributed.all_reduce(own.grad)
        error, size = ((own.grad / 2 - expected.grad).norm().item(), expected.grad.norm().item())
        assert error < 1e-3 * size + 1e-5, (name, error, size)
    for (name, expected), own in zip(whole.named_buffers(), half.buffers(), strict=True):
        torch.testing.assert_close(own.cpu(), expected.cpu(), msg=name)


def train(rank: int, port: int, data: Path, out: Path) -> None:
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in names.items()})
    pretend_gpu.use_nccl()
    connect_processes(Config(dict(launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=60)))))
    compare_sync_bn(rank)
    settings = [
        'model.backbone.norm_cfg.type=SyncBN',
        'train_dataloader.batch_size=1',
        'default_hooks.signal.type=SignalAt',
    ]
    settings += ['train_cfg.val_interval=1', 'val_dataloader.batch_size=1', 'optim_wrapper.accumulative_counts=2']
    options = ['--data', data, '--work-dir', out / 'work', '--image-size', 64, '--no-check', '--amp']
    arguments = [data / 'tiny.py', *options, '--launcher', 'pytorch', '--cfg-options', *settings]
    run('train', list(map(str, arguments)))


if __name__ == '__main__':
    data, out = map(Path, sys.argv[1:])
    port = get_free_port()
    forks = [toy.fork(lambda rank=rank: train(rank, port, data, out), out / f'says_{rank}') for rank in range(2)]
    statuses = [toy.status_of(fork) for fork in forks]
    for path in sorted(out.glob('says_*')):
        print(path.name, path.read_text()[-3000:])
    print(json.dumps(statuses))
