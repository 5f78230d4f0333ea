"""Everything that only a GPU shows, in one command: what is right on it, and how fast it is.

    spec-mmdet gpu-check [--out work_dirs/gpu_check]

Nothing is downloaded, and no part begins after 6 minutes, so that all ends after about 8. A part that fails is written
down with the line that failed, and the rest goes on; the exit status is then 1. Written are gpu_check.md and
gpu_check.json.
--device cpu runs the same code at a small size, of the training steps two, to test this command.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.ops import RoIAlign, nms, sigmoid_focal_loss
from torch import Tensor

from ..configs import find_config, read_config
from ..data.folders import use_folder
from ..data.shapes import write_split
from ..errors import InputError
from ..files import write
from ..models.attention import xca_gram, xca_plain
from ..models.products import Upsample, compute_gram
from ..models.xcit import SpecXCiT
from ..substitution import protect
from ..training.running import adapt_to_data, train
from ..training.schedule import set_epochs
from ..training.speed import (
    AMP,
    Setting,
    build_detector,
    describe_processor,
    make_objects,
    measure_models,
    measure_seconds,
)
from .common import parser

LIMIT = 6 * 60  # seconds after which no part begins
TOLERANCE = 2e-4  # of the largest number, in float32; TF32 is off in these comparisons

Row = dict[str, object]


def difference(own: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors, over the largest number of the second."""
    return ((own.cpu().double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def require(holds: bool, what: str) -> None:
    """Fail the part unless something holds."""
    if not holds:
        raise AssertionError(what)


def xca_arguments(tokens: int, heads: int, head_dim: int, lam: float = 0.0) -> list[Tensor]:
    """Tokens and weights for XCA, in float64."""
    C = heads * head_dim
    randn = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = randn(3 * C, C) * C**-0.5 + lam * torch.eye(C, dtype=torch.float64).repeat(3, 1)
    return [randn(2, tokens, C), W, 0.1 * randn(3 * C), randn(C, C) * C**-0.5, 0.1 * randn(C), 1 + randn(heads, 1, 1)]


def operators(args: argparse.Namespace) -> Iterator[Row]:
    """Each operator's values and gradients against the CPU's."""
    torch.manual_seed(0)
    corners = torch.rand(500, 2) * 200
    boxes = torch.cat([corners, corners + 4 + torch.rand(500, 2) * 60], dim=1)
    regions = torch.cat([torch.zeros(500, 1), boxes], dim=1)
    upsample = Upsample(64, 64, 2)
    tried = {
        'RoIAlign': (lambda x: RoIAlign(7, 0.25, 0)(x, regions.to(x.device)), [torch.randn(1, 32, 64, 64)]),
        'focal loss': (
            lambda x: sigmoid_focal_loss(x, (torch.arange(400) % 81).to(x.device), 2.0, 0.25, None, 'none'),
            [torch.randn(400, 80)],
        ),
        'transposed convolution': (
            lambda x, W, b: F.conv_transpose2d(x, W, b, 2) if x.is_cuda else torch.func.functional_call(
                upsample, dict(weight=W, bias=b), x
            ),
            [torch.randn(2, 64, 24, 40), upsample.weight.detach(), upsample.bias.detach()],
        ),
        'XCA, Gram form': (xca_gram, [t.float() for t in xca_arguments(1000, 4, 48)]),
        'XCA, lambda = 10': (xca_gram, [t.float() for t in xca_arguments(1000, 4, 48, lam=10.0)]),
    }  # fmt: skip
    for name, (function, given) in tried.items():
        results = []
        for device in ('cpu', args.device):
            leaves = [tensor.detach().to(device).requires_grad_() for tensor in given]
            y = function(*leaves)
            gradients = torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(dim=-1) / y.shape[-1])
            results.append([y.detach(), *gradients])
        value, *gradients = (difference(own, right.cpu()) for right, own in zip(*results))
        yield dict(operator=name, value=value, gradient=max(gradients))
        require(max(value, *gradients) < TOLERANCE, f'{name}: {max(value, *gradients):.1e}')
    scores = torch.rand(500)
    kept = [nms(boxes.to(d), scores.to(d), 0.5)[1].tolist() for d in ('cpu', args.device)]
    yield dict(operator='nms', value=float(kept[0] != kept[1]))
    require(kept[0] == kept[1], 'nms keeps other boxes')


def half_precision(args: argparse.Namespace) -> Iterator[Row]:
    """Errors under autocast against float64: the Gram form's over the plain form's."""
    x = torch.randn(2, 4000, 192, device=args.device).bfloat16()
    exact = x.double().mT @ x.double()
    error = ((compute_gram(x) - exact).norm() / exact.norm()).item()
    yield dict(product='Gram matrix of bfloat16', error=error)
    require(compute_gram(x).dtype == torch.float32 and error < 2**-9, f'the Gram matrix is wrong by {error:.1e}')
    for lam in (0.0, 10.0):
        given = xca_arguments(2000, 4, 48, lam)
        expected = xca_plain(*given)
        for dtype in (torch.bfloat16, torch.float16):
            on_device = [tensor.float().to(args.device) for tensor in given]
            with torch.autocast(torch.device(args.device).type, dtype):
                errors = [(form(*on_device).cpu().double() - expected).norm() for form in (xca_gram, xca_plain)]
            yield dict(product=f'XCA, lambda = {lam:g}, {dtype}', ratio=(errors[0] / errors[1]).item())
            require(errors[0] <= 1.05 * errors[1], f'the Gram form is less exact: {errors[0] / errors[1]:.2f}')


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """A training step of the detector in every precision and conditioning."""
    kind = torch.device(args.device).type
    images = torch.randn(1 if args.small else 2, 3, *args.size, device=args.device)
    samples = [make_objects(*args.size).to(args.device) for _ in images]
    for conditioning in ('identity',) if args.small else ('ours', 'identity', 'svd'):
        model = build_detector(conditioning, args.arch, 16).to(args.device).train()
        for amp, dtype in AMP.items():
            if args.small and amp == 'fp16':
                continue  # whose convolutions take minutes on a CPU
            optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
            scaler = torch.amp.GradScaler(kind, init_scale=2.0**10, enabled=amp == 'fp16')
            with torch.autocast(kind, dtype, enabled=amp is not None):
                loss = model.parse_losses(model(images, samples, mode='loss'))[0]
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            scaler.step(optimizer)
            scaler.update()
            yield dict(conditioning=conditioning, precision=amp or 'fp32', loss=loss.item(), gradient_norm=norm)
            require(np.isfinite([loss.item(), norm]).all(), f'{conditioning} in {amp or "fp32"}: not finite')


def demo(args: argparse.Namespace) -> Iterator[Row]:
    """The demo's training, and that it is resumed."""
    data, work = args.out / 'shapes', args.out / 'demo'
    count = 8 if args.small else 800
    for split, images in dict(train=count, val=8).items():
        write_split(data, split, images, 256, np.random.default_rng(images))
    for epochs in (1, 2):
        cfg = read_config(find_config('xcit_spec_shapes'))
        use_folder(cfg, data, ('train', 'val', 'test'))
        set_epochs(cfg, epochs)
        settings = {'default_hooks.logger.interval': 1, 'param_scheduler.0.end': 1, 'val_cfg': None}
        settings |= dict(val_dataloader=None, val_evaluator=None, work_dir=str(work), launcher='none')
        cfg.merge_from_dict(settings)
        protect(cfg)
        adapt = partial(adapt_to_data, cfg, ('train',), thorough=False)
        train(cfg, adapt, resume='auto' if epochs == 2 else None)
    logs = [path.read_text() for path in sorted(work.glob('*/vis_data/scalars.json'))]
    losses = [entry['loss'] for entry in map(json.loads, ''.join(logs).splitlines()) if 'loss' in entry]
    yield dict(steps=len(losses), first_loss=losses[0], last_loss=losses[-1])
    require(len(losses) == 2 * (count // 8), 'the resumed training has not gone on where it was')
    require(args.small or np.mean(losses[-20:]) < 0.9 * np.mean(losses[:20]), 'the loss does not fall')


def compiled(args: argparse.Namespace) -> Iterator[Row]:
    """Compiled blocks on several sizes against those that are not, without a graph break."""
    backend = 'aot_eager' if args.small else 'inductor'
    torch.compiler.reset()
    arch = dict(dim=32, depth=4, num_heads=4) if args.small else args.arch
    own = SpecXCiT(arch, compile=dict(dynamic=True, fullgraph=True, backend=backend)).to(args.device)
    plain = SpecXCiT(arch).to(args.device)
    plain.load_state_dict(own.state_dict())
    for height, width in ((64, 96), (96, 128)) if args.small else ((800, 1216), (640, 960), (1216, 800)):
        images = torch.randn(1, 3, height, width, device=args.device)
        start = time.perf_counter()
        results = []
        for model in (own, plain):
            model.zero_grad()
            y = model(images)[0]
            y.square().mean().backward()
            results.append([y.detach(), model.blocks[0].mlp.fc1.weight.grad])
        value, gradient = (difference(a, b.cpu()) for a, b in zip(*results))
        seconds = time.perf_counter() - start
        yield dict(size=f'{height}x{width}', value=value, gradient=gradient, seconds=seconds)
        require(max(value, gradient) < 10 * TOLERANCE, f'{height}x{width}: {max(value, gradient):.1e}')


def limits(args: argparse.Namespace) -> Iterator[Row]:
    """The device's own rates: of large square products, and of copying."""
    n = 256 if args.small else 8192
    cuda = torch.device(args.device).type == 'cuda'
    for name, dtype, tf32 in (
        ('float32', torch.float32, False),
        ('TF32', torch.float32, True),
        ('bfloat16', torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(n, n, device=args.device, dtype=dtype)
        seconds = min(measure_seconds(partial(torch.mm, a, a), cuda) for _ in range(6))
        yield dict(limit=f'{name} products', rate=f'{2 * n**3 / seconds / 1e12:.2f} TFLOP/s')
    torch.backends.cuda.matmul.allow_tf32 = False
    a = torch.empty(n * n * 4, device=args.device)
    seconds = min(measure_seconds(a.clone, cuda) for _ in range(6))
    yield dict(limit='copying', rate=f'{2 * a.numel() * 4 / seconds / 1e9:.0f} GB/s')


def speed(what: str, amp: str | None, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of spec-mmdet benchmark."""
    names = ['timm', 'timm-compiled', 'plain-form', 'ours', 'ours-compiled', 'identity']
    if what == 'detector':
        names = ['plain-form', 'ours', 'ours-compiled', 'resnet-50', 'swin-t']
    if args.small:
        names = [name for name in names if name in ('timm', 'ours')]
    setting = Setting(
        args.arch,
        batch=1 if args.small else 4,
        size=args.size,
        amp=amp,
        device=args.device,
        detector=what == 'detector',
        rounds=1 if args.small else 10,
        memory=not args.small,
    )
    yield from measure_models(names, setting)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    'operators': operators,
    'half precision': half_precision,
    'limits of the device': limits,
    'training steps': steps,
    'demo and resuming': demo,
    'compiled': compiled,
    'backbone, bf16': partial(speed, 'backbone', 'bf16'),
    'detector, bf16': partial(speed, 'detector', 'bf16'),
    'backbone, float32': partial(speed, 'backbone', None),
}


def run_part(part: Callable[[argparse.Namespace], Iterator[Row]], args: argparse.Namespace) -> tuple[list[Row], str]:
    """A part's rows, and how it failed if it did."""
    rows = []
    try:
        for row in part(args):
            rows.append(row)
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        first = str(error).partition('\n')[0]
        return rows, f'{type(error).__name__}: {first} ({Path(frame.filename).name}:{frame.lineno}, {frame.line})'
    return rows, ''


def as_text(value: object) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def as_markdown(head: str, parts: dict[str, dict]) -> str:
    """The report: a table a part."""
    lines = ['# spec-mmdet gpu-check', '', head, '']
    for name, part in parts.items():
        outcome = f'**failed**: {part["failed"]}' if part['failed'] else 'ok'
        lines += [f'## {name}', '', f'{outcome}, {part["seconds"]:.0f} s', '']
        if keys := list(dict.fromkeys(key for row in part['rows'] for key in row)):
            lines += [f'| {" | ".join(keys)} |', '|---' * len(keys) + '|']
            lines += [f'| {" | ".join(as_text(row.get(key, "")) for key in keys)} |' for row in part['rows']]
            lines.append('')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('gpu-check', __doc__)
    options.add_argument('--device', default='cuda', help='cpu runs the same code at a small size (default: cuda)')
    options.add_argument('--out', type=Path, default=Path('work_dirs/gpu_check'), help='folder for results (default: '
                         'work_dirs/gpu_check)')  # fmt: skip
    args = options.parse_args(argv)
    args.small = torch.device(args.device).type == 'cpu'
    if not args.small and not torch.cuda.is_available():
        raise InputError('no GPU here that PyTorch can use; --device cpu runs the same checks at a small size')
    args.arch, args.size = ('nano_12', (64, 64)) if args.small else ('small_12', (800, 1216))
    head = f'{describe_processor(args.device)}; torch {torch.__version__}, CUDA {torch.version.cuda}'
    head += f'; {args.arch}, {args.size}'
    print(head)
    start, parts = time.time(), {}
    for name, part in PARTS.items():
        began = time.time()
        rows, failed = [], 'not begun: the time was up'
        if began - start < LIMIT:
            rows, failed = run_part(part, args)
        parts[name] = dict(failed=failed, seconds=time.time() - began, rows=rows)
        print(f'{name}: {failed or "ok"}', flush=True)
        # After each part, so that what was measured is there whatever happens to the rest.
        write(args.out / 'gpu_check.json', json.dumps(dict(head=head, parts=parts), indent=1))
        write(args.out / 'gpu_check.md', as_markdown(head, parts))
    print(f'wrote {args.out / "gpu_check.md"} and gpu_check.json, in {time.time() - start:.0f} s')
    if any(part['failed'] for part in parts.values()):
        sys.exit(1)
