"""Run ``spec-mmdet gpu-check`` with the parts that measure this project, within six minutes.

    python -m benchmarks.gpu [--device cuda] [--out work_dirs/gpu_check]

They are errors in half precision, limits of the device, compiled blocks, and backbones beside timm's XCiT.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch

from spec_mmdet.commands import command_line, gpu_check
from spec_mmdet.models.attention import compute_xca, compute_xca_by_gram
from spec_mmdet.models.products import compute_gram
from spec_mmdet.models.xcit import SpecXCiT
from spec_mmdet.training.gpu_checks import (
    PARTS,
    TOLERANCE,
    GpuCheck,
    Row,
    compute_gradients,
    disable_tf32,
    make_xca_arguments,
    measure_difference,
    measure_speed,
)
from spec_mmdet.training.speed import measure_seconds


def check_half_precision(check: GpuCheck) -> Iterator[Row]:
    """Compare the errors under autocast, relative to float64, of the Gram form and the plain form."""
    x = torch.randn(2, 4000, 192, device=check.device).bfloat16()
    exact = x.double().mT @ x.double()
    error = ((compute_gram(x) - exact).norm() / exact.norm()).item()
    passed = compute_gram(x).dtype == torch.float32 and error < 2**-9
    yield dict(product='Gram matrix of bfloat16', value=error, passed=passed)
    for lam in (0.0, 10.0):
        inputs = make_xca_arguments(2000, 4, 48, lam)
        by_y = torch.randn(inputs[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = compute_gradients(compute_xca, inputs, by_y)
        on_device = [tensor.float().to(check.device) for tensor in inputs]
        for dtype in (torch.bfloat16, torch.float16):
            errors = []
            for form in (compute_xca_by_gram, compute_xca):
                with torch.autocast(torch.device(check.device).type, dtype):
                    own = compute_gradients(form, on_device, by_y)
                relative = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(own, expected)]
                errors.append([relative[0], np.linalg.norm(relative[1:])])
            value, gradient = (float(gram / plain) for gram, plain in zip(*errors))
            passed = value <= 1.05 and gradient <= 1.1  # False for NaN
            yield dict(product=f'XCA, lambda = {lam:g}, {dtype}', value=value, gradient=gradient, passed=passed)


@disable_tf32
def check_compiled(check: GpuCheck) -> Iterator[Row]:
    """Compare compiled with plain blocks at several sizes, without graph breaks."""
    backend = 'aot_eager' if check.small else 'inductor'
    torch.compiler.reset()
    arch = dict(dim=32, depth=4, num_heads=4) if check.small else check.arch
    own = SpecXCiT(arch, compile=dict(dynamic=True, fullgraph=True, backend=backend)).to(check.device)
    plain = SpecXCiT(arch).to(check.device)
    plain.load_state_dict(own.state_dict())
    for height, width in ((64, 96), (96, 128)) if check.small else ((800, 1216), (640, 960), (1216, 800)):
        images = torch.randn(1, 3, height, width, device=check.device)
        start = time.perf_counter()
        results = []
        for model in (own, plain):
            model.zero_grad()
            y = model(images)[0]
            y.square().mean().backward()
            results.append([y.detach(), model.blocks[0].mlp.fc1.weight.grad])
        value, gradient = (measure_difference(a, b.cpu()) for a, b in zip(*results))
        seconds = time.perf_counter() - start
        passed = max(value, gradient) < 10 * TOLERANCE
        yield dict(size=f'{height}x{width}', value=value, gradient=gradient, seconds=seconds, passed=passed)


@disable_tf32
def measure_limits(check: GpuCheck) -> Iterator[Row]:
    """Measure the device's limits: rates of large matrix products and of copying."""
    n = 256 if check.small else 8192
    cuda = torch.device(check.device).type == 'cuda'
    for name, dtype, tf32 in (
        ('float32', torch.float32, False),
        ('TF32', torch.float32, True),
        ('bfloat16', torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(n, n, device=check.device, dtype=dtype)
        seconds = min(measure_seconds(partial(torch.mm, a, a), cuda) for _ in range(6))
        yield {'limit': f'{name} products', 'TFLOP/s': 2 * n**3 / seconds / 1e12}
    a = torch.empty(n * n * 4, device=check.device)
    seconds = min(measure_seconds(a.clone, cuda) for _ in range(6))
    yield {'limit': 'copying', 'GB/s': 2 * a.numel() * 4 / seconds / 1e9}


def measure_backbones(check: GpuCheck) -> Iterator[Row]:
    """Time backbones in bfloat16; timm's compiled XCiT is in channels_last."""
    names = ['timm', 'ours'] if check.small else ['timm-compiled', 'timm', 'ours', 'ours-compiled']
    yield from measure_speed(names, check.setting(detector=False))


MORE = {
    'half precision': (10, check_half_precision),
    'limits of the device': (10, measure_limits),
    'compiled': (45, check_compiled),
    'backbone, bf16': (90, measure_backbones),
}


def main(argv: Sequence[str] | None = None) -> None:
    PARTS.update(MORE)
    gpu_check.main(argv)


if __name__ == '__main__':
    with command_line():
        main()
