"""Measure time and peak memory of backbones and detectors: ours, the plain form, timm's and MMDetection's.

    spec-mmdet benchmark --arch small_12 --sizes 640x640 800x1216
    spec-mmdet benchmark --detector

Models for --models:

    ours, ours-compiled    this project's XCiT
    plain-form             ours with the plain form of the attention
    identity, svd          ours with a conditioning
    levels                 ours with the four feature maps of a detector (not with --detector)
    timm, timm-compiled    timm's XCiT, channels_last if compiled (not with --detector)
    resnet-50, swin-t      MMDetection's, with feature maps; ResNet-50 with one frozen stage, as in training

All XCiTs have the same weights, and all models get the same images (detectors with random objects). Unless noted,
backbones are timed up to their last block, without a feature pyramid. Models take turns, so that other load on the
machine affects them alike.

"ratio" is the time of the first model divided by that of the model (median over the rounds): above 1 is faster. "share"
is the model's rate of multiply-adds relative to that of plain matrix products in the same precision, measured in each
round. The command prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..status import show_status
from .common import make_parser, require_positive


def print_table(rows: list[dict], size: str) -> None:
    """Print the rows of one size as a Markdown table."""
    rate = rows[0]['matrix_rate'] / 1e9
    print(f'\n{size}: matrix products at {rate:.0f} GFLOP/s\n')
    print(
        '| model | inference, s | ratio | share | training, s | ratio | share | peak, MiB |', '|---' * 8 + '|', sep='\n'
    )
    for row in rows:
        cells = [row['model']]
        for job in ('inference', 'training'):
            share = row.get(f'{job}_share')
            cells += [f'{row[f"{job}_s"]:.3f}', f'{row[f"{job}_ratio"]:.2f}', f'{share:.0%}' if share else '']
        cells.append(f'{row["training_peak_bytes"] / 2**20:.0f}' if 'training_peak_bytes' in row else '')
        print(f'| {" | ".join(cells)} |', flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmark', __doc__)
    options.add_argument('--arch', default='small_12', help='architecture of XCiT (default: small_12)')
    options.add_argument(
        '--patch-size', type=int, default=16, choices=[8, 16], help='patch size in pixels (default: 16)'
    )
    options.add_argument('--sizes', nargs='+', default=['640x640'], metavar='HEIGHTxWIDTH', help='image sizes in '
                         'pixels (default: 640x640)')  # fmt: skip
    options.add_argument('--batch', type=require_positive(int), default=1, help='images per forward pass (default: 1)')
    options.add_argument(
        '--rounds', type=require_positive(int), default=7, help='number of timings of each model (default: 7)'
    )
    options.add_argument('--amp', choices=['bf16', 'fp16'], help='mixed precision (default: float32)')
    options.add_argument('--device', help='for instance cpu or cuda:1 (default: a GPU if there is one)')
    options.add_argument('--models', nargs='+', metavar='MODEL', help='see below (default: timm if it is installed, '
                         'plain-form, ours, identity, svd; with --detector: plain-form, ours)')  # fmt: skip
    options.add_argument('--detector', action='store_true', help='time Mask R-CNNs instead of backbones')
    options.add_argument('--no-memory', action='store_true', help='do not measure peak memory')
    options.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of benchmark.json '
                         '(default: work_dirs/benchmark)')  # fmt: skip
    args = options.parse_args(argv)

    import torch

    from ..errors import InputError
    from ..files import write
    from ..inference.inferencer import require_device
    from ..models.xcit import ARCHS
    from ..training.speed import Setting, describe_processor, measure_models

    if args.arch not in ARCHS:
        raise InputError(f'--arch {args.arch}: choose from {", ".join(ARCHS)}')
    names = args.models or ['plain-form', 'ours']
    if not args.models and not args.detector:
        names = [*(['timm'] if find_spec('timm') else []), *names, 'identity', 'svd']
    require_device(args.device)
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    processor = describe_processor(device)
    print(f'{"Mask R-CNN" if args.detector else "backbone"}, {args.arch} p{args.patch_size}, batch {args.batch}, '
          f'{args.amp or "float32"}; {processor}, torch {torch.__version__}; ratios to {names[0]}')  # fmt: skip
    rows = []
    for text in args.sizes:
        try:
            height, width = map(require_positive(int), text.split('x'))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise InputError(f'--sizes {text}: write HEIGHTxWIDTH in pixels, for instance 640x640') from error
        size = height, width
        shared = dict(detector=args.detector, rounds=args.rounds, memory=not args.no_memory)
        setting = Setting(args.arch, args.patch_size, args.batch, size, args.amp, device, **shared)
        with show_status(f'timing at {text}'):
            rows += (found := list(measure_models(names, setting)))
        print_table(found, text)
    settings = {k: str(v) for k, v in vars(args).items()} | dict(device_name=processor, torch=torch.__version__)
    write(args.out / 'benchmark.json', json.dumps(dict(settings=settings, rows=rows), indent=1))
    print(f'wrote {args.out}')
