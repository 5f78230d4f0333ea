"""Check on a GPU what a CPU cannot show: correct results and speed.

    spec-mmdet gpu-check [--out work_dirs/gpu_check]

Nothing is downloaded. The command ends within 4 minutes: each part has a limit. After a failed part the others run, and
the exit status is 1. The parts compare operators, training steps in every precision, and loss curves over 200
iterations in float32, float16 and bfloat16, and time Mask R-CNN on small_12 at 800 x 1216 pixels against ResNet-50 and
Swin-T. The report with the device's name is written to gpu_check.md, gpu_check.csv and gpu_check.json. --device cpu
runs the same checks at a small size, to test this command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .common import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('gpu-check', __doc__)
    options.add_argument('--device', default='cuda', help='cpu runs the same code at a small size (default: cuda)')
    options.add_argument('--out', type=Path, default=Path('work_dirs/gpu_check'), help='folder for results (default: '
                         'work_dirs/gpu_check)')  # fmt: skip
    args = options.parse_args(argv)

    import torch

    from ..inference.inferencer import require_device
    from ..training.gpu_checks import GpuCheck, run_checks
    from ..training.speed import describe_processor

    require_device(args.device)
    check = GpuCheck(args.device, args.out)
    head = f'{describe_processor(args.device)}; torch {torch.__version__}, CUDA {torch.version.cuda}'
    head += f'; {check.arch}, {check.size}'
    print(head)
    failed = False
    for name, fault in run_checks(check, head):
        print(f'{name}: {fault or "passed"}', flush=True)
        failed |= bool(fault)
    print(f'wrote {args.out / "gpu_check.md"}, gpu_check.csv and gpu_check.json')
    if failed:
        sys.exit(1)
