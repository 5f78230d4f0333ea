"""Test whether the conditioning helps a detector: pretrain, convert, fine-tune and evaluate every arm and seed.

    python -m research.experiment

First it screens lambda with one seed; then it trains every final arm with three other seeds, fine-tuned from its own
pretraining and, for some arms, from scratch with the same budget. All arms of a seed start from the same W0 and see the
same images in the same order. A finished run leaves a log in research/experiment/logs and is not repeated, so that an
interrupted experiment continues where it stopped. The report, research/experiment/README.md, is written from the logs
at the end; --report only writes the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from research.scenes import Figures, Garments, write_scenes
from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.files import write

from .arms import SIZES, Run, plan_stages, read_logs
from .chain import WORK, Chain
from .report import write_report

LOGS = Path(__file__).with_name('logs')
REPORT = Path(__file__).with_name('README.md')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('research.experiment', __doc__, 'python -m')
    options.add_argument('--size', choices=list(SIZES), default='cpu', help='of the data and the model: for two cores '
                         '(default), or for one GPU')  # fmt: skip
    options.add_argument('--jobs', type=int, help='trainings at a time (default: one a core, or one on a GPU)')
    options.add_argument('--fashion-mnist', type=Path, metavar='FOLDER', help='detect garments, as in research.scenes')
    options.add_argument('--report', action='store_true', help='write the report of the finished runs, and stop')
    args = options.parse_args(argv)
    kind = f'{args.size}-garments' if args.fashion_mnist else args.size
    folder, size = LOGS / kind, SIZES[args.size]
    jobs = args.jobs or (1 if torch.cuda.device_count() else os.cpu_count() or 1)
    data = WORK.with_name(f'experiment_data_{kind}')
    chain = Chain(size, data, max(1, (os.cpu_count() or 1) // jobs))

    def finish(run: Run) -> None:
        log = chain.train(run)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f'{run.name}.json', json.dumps(log))
        ap = ', '.join(f'{kind} AP {value:.3f}' for kind, value in log['ap'].items())
        print(f'{run.name}: {ap}, {log["seconds"]} s', flush=True)

    for runs in plan_stages(chain.backbone, lambda: read_logs(folder)) if not args.report else ():
        remaining = [run for run in runs if not (folder / f'{run.name}.json').is_file()]
        print(f'{len(runs)} runs, {len(runs) - len(remaining)} of them finished', flush=True)
        if remaining and not data.is_dir():
            source = Garments(args.fashion_mnist) if args.fashion_mnist else Figures()
            write_scenes(data, source, size.scenes, size.val, size.pixels, size.crops, size.crop_pixels)
        with ThreadPoolExecutor(jobs) as pool:
            for result in [pool.submit(finish, run) for run in remaining]:
                result.result()
    print(f'wrote {write_report(LOGS, REPORT)}')


if __name__ == '__main__':
    with command_line():
        main()
