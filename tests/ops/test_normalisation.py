"""Compare mmcv's batch normalisation over processes, in one process, with PyTorch's."""

import pytest
import torch
import torch.distributed as dist
from mmcv.ops.sync_bn import SyncBatchNorm
from plain import assert_same_with_gradients


@pytest.fixture(scope='module', autouse=True)
def one_process():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('stats_mode', ['default', 'N'])
@pytest.mark.parametrize('shape', [(3, 4, 5, 6), (2, 4, 1, 1)])
def test_synchronised_batch_norm(shape, stats_mode):
    module = SyncBatchNorm(4, momentum=0.2, stats_mode=stats_mode)
    plain = torch.nn.BatchNorm2d(4, momentum=0.2)
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for norm in (module, plain):
        norm.weight, norm.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
        norm.running_mean.copy_(torch.arange(4)), norm.running_var.copy_(torch.arange(4) + 1)

    def form(norm):
        def run(input, weight, bias):
            return torch.func.functional_call(norm, dict(weight=weight, bias=bias), (input,))

        return run

    input = (3 * torch.randn(shape) + 2).requires_grad_()
    assert_same_with_gradients(form(module), form(plain), input, weight, bias, rtol=1e-4, atol=1e-4)
    for name in ('running_mean', 'running_var'):
        torch.testing.assert_close(getattr(module, name), getattr(plain, name))
    half = module(input.half())
    assert half.dtype == torch.half
    torch.testing.assert_close(half.float(), module(input), rtol=0.01, atol=0.01)
