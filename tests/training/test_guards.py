"""Mixed precision: steps that are skipped because a gradient overflows, and the error for too many of them."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import toy
from mmengine.hooks import Hook
from mmengine.optim.optimizer import amp_optimizer_wrapper

from spec_mmdet import InputError
from spec_mmdet.checkpoints.reading import load


class Overflow(Hook):
    """Make the gradient, or the loss, infinite in some iterations, counted from 1; keep the weights after each."""

    def __init__(self, what: str, iterations: list[int]) -> None:
        self.what, self.iterations = what, iterations
        self.weights: list[torch.Tensor] = []

    def before_train(self, runner) -> None:
        def overflow(gradient):
            spoil = self.what == 'gradient' and runner.iter + 1 in self.iterations
            return gradient * torch.inf if spoil else gradient

        runner.model.layer.weight.register_hook(overflow)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if self.what == 'loss' and runner.iter + 1 in self.iterations:
            data_batch['inputs'][0][:] = torch.inf

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        assert all(type(value) is float for value in outputs.values())  # read from the GPU once for all hooks
        self.weights.append(runner.model.layer.weight.detach().clone())


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """MMEngine supports mixed precision only on GPUs, PyTorch also on a CPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))


def train(work: Path, what: str, iterations: list[int], accumulate: int = 1, **settings) -> tuple[Overflow, object]:
    """Train four epochs of four iterations."""
    overflow = Overflow(what, iterations)
    optim = dict(type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=0.01), accumulative_counts=accumulate)
    optim |= dict(dtype='bfloat16') | settings
    runner = toy.runner(work, optim_wrapper=optim, custom_hooks=[dict(type='FiniteGuard'), overflow])
    runner.train()
    return overflow, runner.optim_wrapper.loss_scaler


@pytest.mark.parametrize('scale', ['dynamic', 65536.0])
def test_an_overflowing_gradient_skips_the_step(amp_on_cpu, tmp_path, scale):
    left_out = [3, *range(5, 14)]  # nine in a row
    overflow, scaler = train(tmp_path, 'gradient', left_out, loss_scale=scale)
    moved = [i for i in range(2, 17) if not torch.equal(*overflow.weights[i - 2 : i])]
    assert moved == [i for i in range(2, 17) if i not in left_out]
    assert scaler.get_scale() == (2.0**6 if scale == 'dynamic' else scale)
    assert load(tmp_path / 'epoch_4.pth')['meta']['iter'] == 16


@pytest.mark.parametrize(
    ('what', 'accumulate', 'stops', 'says'),
    [
        ('gradient', 1, 14, 'the gradient, at a loss scale of 64;'),
        ('loss', 1, 14, 'loss (inf|nan)'),
        # A step every second iteration: the iterations between two skipped steps are not wrong.
        ('gradient', 2, None, ''),
    ],
)
def test_ten_in_a_row_stop_the_training(amp_on_cpu, tmp_path, what, accumulate, stops, says):
    if stops is None:
        _, scaler = train(tmp_path, what, list(range(5, 17)), accumulate)
        assert scaler.get_scale() == 2.0**10
        return
    with pytest.raises(InputError, match=f'iteration {stops}: not finite: .*{says}') as stopped:
        train(tmp_path, what, list(range(5, 17)), accumulate)
    line = str(stopped.value)
    assert '\n' not in line and re.search(r'the last good checkpoint is .*epoch_3.pth. The batch is in', line)
    assert load(tmp_path / f'not_finite_{stops}_0.pth')['iter'] == stops


@pytest.mark.parametrize('what', ['gradient', 'loss'])
def test_skipped_steps_are_not_in_the_logged_means(amp_on_cpu, tmp_path, what):
    """The first step and a later one overflow; every fourth iteration logs means of the steps that were taken."""
    norms, losses, sent = [], [], []

    class Note(Hook):
        def before_train(self, runner) -> None:
            optim = runner.optim_wrapper
            optim.optimizer.register_step_pre_hook(
                lambda *args: sent.append(
                    torch.cat([parameter.grad.flatten() for parameter in runner.model.parameters()])
                )
            )

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            finite = runner.iter + 1 not in (1, 7)
            norms.append(sent.pop().norm().item() if finite else None)
            losses.append(outputs.get('loss') if finite or what == 'gradient' else None)

    hooks = [dict(type='FiniteGuard'), Overflow(what, [1, 7]), Note()]
    optim = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.01), dtype='bfloat16', loss_scale='dynamic')
    optim['clip_grad'] = dict(max_norm=1e9)
    logger = dict(checkpoint=None, logger=dict(type='LoggerHook', interval=4))
    toy.runner(tmp_path, optim_wrapper=optim, custom_hooks=hooks, default_hooks=logger).train()
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in scalars.read_text().splitlines()]
    lines = [line for line in lines if 'loss' in line]
    assert len(lines) == 4
    for end, line in zip((4, 8, 12, 16), lines):
        for logged, values in ((line['grad_norm'], norms), (line['loss'], losses)):
            values = [value for value in values[:end] if value is not None][-10:]  # MMEngine's window
            assert logged == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_the_error_for_float16_overflow_does_not_advise_a_lower_learning_rate(amp_on_cpu, tmp_path):
    for dtype, helps in (
        (None, 'optim_wrapper.dtype=bfloat16'),
        ('bfloat16', 'learning rate'),
    ):  # None is a GPU's float16
        with pytest.raises(InputError, match=helps) as stopped:
            train(tmp_path / str(dtype), 'gradient', list(range(1, 17)), dtype=dtype)
        assert ('learning rate' in str(stopped.value)) == (dtype == 'bfloat16')


def test_without_a_scale_the_first_one_stops(tmp_path):
    hooks = [dict(type='FiniteGuard'), Overflow('gradient', [3])]
    optim = dict(optimizer=dict(type='AdamW', lr=0.01), clip_grad=dict(max_norm=1))
    with pytest.raises(InputError, match='iteration 3: .*gradient'):
        toy.runner(tmp_path, optim_wrapper=optim, custom_hooks=hooks).train()


@pytest.mark.parametrize('loop', [dict(type='ExactEpochTrainLoop', max_epochs=1),
                                  dict(type='ExactIterTrainLoop', max_iters=3)])  # fmt: skip
def test_a_training_without_a_batch_is_refused(tmp_path, loop):
    few = toy.loader(1, drop_last=True)
    with pytest.raises(InputError, match='1 images are fewer than a batch of 2 .* drop_last'):
        toy.runner(tmp_path, train_cfg=loop, train_dataloader=few).train()
