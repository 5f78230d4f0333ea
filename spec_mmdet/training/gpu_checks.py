"""Check on a GPU what a CPU cannot show: correct results and speed."""

from __future__ import annotations

import json
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign, nms, sigmoid_focal_loss
from mmengine.config import Config
from torch import Tensor

from ..configs import find_config, read_config
from ..data.shapes import write_split
from ..data.tasks import use_folder
from ..files import format_csv, write
from ..models.attention import compute_xca_by_gram
from ..models.products import Upsample
from .results import read_scalars
from .running import adapt_to_data, train
from .speed import AMP, Setting, build_detector, describe_processor, make_objects, measure_models

TOLERANCE = 2e-4  # relative to the largest number, in float32 without TF32

Row = dict[str, object]


@dataclass(frozen=True)
class GpuCheck:
    """Settings of the checks.

    Attributes:
        device: for instance 'cuda'; 'cpu' uses small sizes, to test the checks.
        out: folder of the report.
    """

    device: str
    out: Path

    @property
    def small(self) -> bool:
        return torch.device(self.device).type == 'cpu'

    @property
    def arch(self) -> str:
        return 'nano_12' if self.small else 'small_12'

    @property
    def size(self) -> tuple[int, int]:
        return (64, 64) if self.small else (800, 1216)

    def setting(self, detector: bool, amp: str | None = 'bf16') -> Setting:
        """Return the settings of timings."""
        batch, rounds = (1, 1) if self.small else (4, 10)
        return Setting(self.arch, 16, batch, self.size, amp, self.device, detector, rounds, memory=not self.small)


def disable_tf32(part: Callable[[GpuCheck], Iterator[Row]]) -> Callable[[GpuCheck], Iterator[Row]]:
    """Disable TF32 in a part; by default, cuDNN rounds float32 operands to 10 bits."""

    @wraps(part)
    def run(check: GpuCheck) -> Iterator[Row]:
        backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
        before = [backend.allow_tf32 for backend in backends]
        try:
            for backend in backends:
                backend.allow_tf32 = False
            yield from part(check)
        finally:
            for backend, allowed in zip(backends, before):
                backend.allow_tf32 = allowed

    return run


def measure_difference(own: Tensor, expected: Tensor) -> float:
    """Return the largest difference between two tensors over the largest number of the second."""
    return ((own.cpu().double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def make_xca_arguments(tokens: int, heads: int, head_dim: int, lam: float = 0.0) -> list[Tensor]:
    """Make tokens and weights for XCA, in float64."""
    C = heads * head_dim
    randn = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = randn(3 * C, C) * C**-0.5 + lam * torch.eye(C, dtype=torch.float64).repeat(3, 1)
    return [randn(2, tokens, C), W, 0.1 * randn(3 * C), randn(C, C) * C**-0.5, 0.1 * randn(C), 1 + randn(heads, 1, 1)]


def compute_gradients(function: Callable[..., Tensor], inputs: list[Tensor], by_y: Tensor) -> list[Tensor]:
    """Return a function's value, and the gradients with respect to its inputs for the gradient ``by_y``."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, by_y.expand_as(y).to(y))]


@disable_tf32
def check_operators(check: GpuCheck) -> Iterator[Row]:
    """Compare each operator's values and gradients with the CPU's."""
    torch.manual_seed(0)
    corners = torch.rand(500, 2) * 200
    boxes = torch.cat([corners, corners + 4 + torch.rand(500, 2) * 60], dim=1)
    regions = torch.cat([torch.zeros(500, 1), boxes], dim=1)
    upsample = Upsample(64, 64, 2)
    operators = {
        'RoIAlign': (lambda x: RoIAlign(7, 0.25, 0)(x, regions.to(x.device)), [torch.randn(1, 32, 64, 64)]),
        'focal loss': (
            lambda x: sigmoid_focal_loss(x, (torch.arange(400) % 81).to(x.device), 2.0, 0.25, None, 'none'),
            [torch.randn(400, 80)],
        ),
        'convolution': (F.conv2d, [torch.randn(2, 64, 24, 40), torch.randn(64, 64, 3, 3)]),
        'transposed convolution': (
            lambda x, W, b: F.conv_transpose2d(x, W, b, 2) if x.is_cuda else torch.func.functional_call(
                upsample, dict(weight=W, bias=b), x
            ),
            [torch.randn(2, 64, 24, 40), upsample.weight.detach(), upsample.bias.detach()],
        ),
        'XCA, Gram form': (compute_xca_by_gram, [t.float() for t in make_xca_arguments(1000, 4, 48)]),
        'XCA, lambda = 10': (compute_xca_by_gram, [t.float() for t in make_xca_arguments(1000, 4, 48, lam=10.0)]),
    }  # fmt: skip
    for name, (function, inputs) in operators.items():
        last = function(*inputs).shape[-1]
        by_y = torch.arange(1.0, last + 1) / last
        results = [
            compute_gradients(function, [tensor.to(device) for tensor in inputs], by_y)
            for device in ('cpu', check.device)
        ]
        value, *gradients = (measure_difference(own, expected) for expected, own in zip(*results))
        yield dict(operator=name, value=value, gradient=max(gradients), passed=max(value, *gradients) < TOLERANCE)
    scores = torch.rand(500)
    kept = [nms(boxes.to(device), scores.to(device), 0.5)[1].tolist() for device in ('cpu', check.device)]
    yield dict(operator='nms', value=float(kept[0] != kept[1]), passed=kept[0] == kept[1])


def check_training_steps(check: GpuCheck) -> Iterator[Row]:
    """Run a training step of the detector in every precision and conditioning."""
    kind = torch.device(check.device).type
    images = torch.randn(1 if check.small else 2, 3, *check.size, device=check.device)
    samples = [make_objects(*check.size).to(check.device) for _ in images]
    for conditioning in ('identity',) if check.small else ('ours', 'identity', 'svd'):
        model = build_detector(conditioning, check.arch, 16).to(check.device).train()
        for amp, dtype in AMP.items():
            if check.small and amp == 'fp16':
                continue  # convolutions in float16 take minutes on a CPU
            optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
            scaler = torch.amp.GradScaler(kind, init_scale=2.0**10, enabled=amp == 'fp16')
            with torch.autocast(kind, dtype, enabled=amp is not None):
                loss = model.parse_losses(model(images, samples, mode='loss'))[0]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            scaler.step(optimizer)
            scaler.update()
            passed = bool(np.isfinite([loss.item(), norm]).all())
            row = dict(conditioning=conditioning, precision=amp or 'fp32', loss=loss.item())
            yield dict(**row, gradient_norm=norm, passed=passed)


def check_loss_curves(check: GpuCheck) -> Iterator[Row]:
    """Train 200 iterations on generated shapes in each precision, resuming in the middle, and compare the losses."""
    data, count = check.out / 'shapes', 8 if check.small else 400
    write_split(data, 'train', count, 64 if check.small else 128, np.random.default_rng(0))
    expected = 0.0
    for amp, dtype in AMP.items():
        if check.small and amp == 'bf16':
            continue
        work = check.out / f'train_{amp or "fp32"}'
        shutil.rmtree(work, ignore_errors=True)
        for epochs in (2, 4):
            train(*configure_training(data, work, epochs, dtype), resume='auto')
        losses = [entry['loss'] for entry in read_scalars(work) if 'loss' in entry]
        means = [float(np.mean(part)) for part in np.array_split(losses, 4)]
        expected = expected or means[-1]
        difference = abs(means[-1] / expected - 1)
        passed = check.small or (means[-1] < 0.9 * means[0] and difference < 0.1)
        quarters = {f'loss, quarter {i}': mean for i, mean in enumerate(means, 1)}
        row = dict(precision=amp or 'fp32', iterations=len(losses), **quarters, difference=difference)
        yield dict(**row, passed=passed and len(losses) == count // 2)


def configure_training(data: Path, work: Path, epochs: int, dtype: torch.dtype | None) -> tuple[Config, Callable]:
    """Return the config of a training of a small detector at a constant learning rate, and its check of the data."""
    cfg = read_config(find_config('xcit_spec_shapes'))
    use_folder(cfg, data, ['train'])
    cfg.launcher, cfg.work_dir = 'none', str(work)
    cfg.train_cfg.max_epochs, cfg.default_hooks.logger.interval = epochs, 1
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50)]
    cfg.default_hooks.update(conditioning=None, results=None)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.optim_wrapper.type = 'AmpOptimWrapper' if dtype else 'OptimWrapper'
    if dtype:
        cfg.optim_wrapper.dtype = str(dtype).removeprefix('torch.')
    return cfg, lambda classes: adapt_to_data(cfg, ['train'], classes, thorough=False)


def measure_speed(names: Sequence[str], setting: Setting) -> Iterator[Row]:
    """Measure images per second, relative to the first model's, and peak memory of models in turns."""
    for row in measure_models(names, setting):
        found: Row = dict(model=row['model'])
        for job in ('inference', 'training'):
            found[f'{job}, images/s'] = setting.batch / row[f'{job}_s']
            found[f'{job}, ratio'] = row[f'{job}_ratio']
        if 'training_peak_bytes' in row:
            found['training, GiB'] = row['training_peak_bytes'] / 2**30
        yield found


def measure_detectors(check: GpuCheck) -> Iterator[Row]:
    """Time Mask R-CNNs in bfloat16."""
    names = ['ours'] if check.small else ['ours', 'ours-compiled', 'resnet-50', 'swin-t']
    yield from measure_speed(names, check.setting(detector=True))


# Each part with its seconds; a part may also use what the earlier ones have left.
PARTS: dict[str, tuple[int, Callable[[GpuCheck], Iterator[Row]]]] = {
    'operators': (15, check_operators),
    'training steps': (35, check_training_steps),
    'loss curves': (75, check_loss_curves),
    'detector, bf16': (80, measure_detectors),
}


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after some seconds."""

    def stop(*args: object) -> None:
        raise TimeoutError(f'stopped after {seconds:.0f} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)  # again, if something catches the exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_part(
    part: Callable[[GpuCheck], Iterator[Row]], check: GpuCheck, seconds: float = 3600
) -> tuple[list[Row], str]:
    """Run a part of the GPU check; return its table rows and a description of failed comparisons or an exception."""
    rows, faults = [], []
    try:
        with limit_time(seconds):
            for row in part(check):
                rows.append(row)
                if not row.get('passed', True):
                    faults.append(
                        ', '.join(f'{key} {format_value(value)}' for key, value in row.items() if key != 'passed')
                    )
    except (Exception, SystemExit) as error:
        frame = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name != 'stop'][-1]
        first = str(error).partition('\n')[0]
        faults.append(f'{type(error).__name__}: {first} ({Path(frame.filename).name}:{frame.lineno}, {frame.line})')
    return rows, '; '.join(faults)


def format_value(value: object) -> str:
    """Return a number with four digits, and anything else as text."""
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def format_report(head: str, parts: dict[str, dict]) -> str:
    """Return the report in Markdown, with a table for each part."""
    lines = ['# spec-mmdet gpu-check', '', head, '']
    for name, part in parts.items():
        outcome = f'**failed**: {part["failed"]}' if part['failed'] else 'ok'
        lines += [f'## {name}', '', f'{outcome}, {part["seconds"]:.0f} s', '']
        if keys := list(dict.fromkeys(key for row in part['rows'] for key in row)):
            lines += [f'| {" | ".join(keys)} |', '|---' * len(keys) + '|']
            lines += [f'| {" | ".join(format_value(row.get(key, "")) for key in keys)} |' for row in part['rows']]
            lines.append('')
    return '\n'.join(lines)


def format_table(device: str, parts: dict[str, dict]) -> str:
    """Return all numbers of the report as CSV, one in each line."""
    lines = []
    for part, content in parts.items():
        for row in content['rows']:
            case = ', '.join(value for value in row.values() if isinstance(value, str))
            numbers = {key: value for key, value in row.items() if not isinstance(value, str)}
            lines += [
                dict(device=device, part=part, case=case, quantity=key, value=format_value(value))
                for key, value in numbers.items()
            ]
    return format_csv(lines)


def run_checks(check: GpuCheck, head: str) -> Iterator[tuple[str, str]]:
    """Run all parts; yield each one's name and failure ('' if it passed).

    gpu_check.md, gpu_check.csv and gpu_check.json are written after each; ``head`` is the first line of the report.
    """
    start, parts, budget = time.time(), {}, 0.0
    for name, (seconds, part) in PARTS.items():
        begin = time.time()
        budget += seconds
        # Small sizes test the checks, on machines that may be busy.
        rows, failed = run_part(part, check, 3600 if check.small else budget - (begin - start))
        parts[name] = dict(failed=failed, seconds=time.time() - begin, rows=rows)
        write(check.out / 'gpu_check.json', json.dumps(dict(head=head, parts=parts), indent=1))
        write(check.out / 'gpu_check.md', format_report(head, parts))
        write(check.out / 'gpu_check.csv', format_table(describe_processor(check.device), parts))
        yield name, failed
