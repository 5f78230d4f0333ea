"""Separate the effect of the corrections' size from that of conditioning: a pre-registered experiment.

    python -m research.followup

About eight hours on one core (four on two); --jobs trainings run at a time, on one thread each. A finished run leaves a
log in research/followup/logs and is not repeated, so that an interrupted experiment continues where it stopped. The
report, research/followup/README.md, is written from the logs; --report only writes the report.

    python -m research.followup --large

is the same protocol with XCiT-S12 on one GPU: an estimated 22 hours at 15 TFLOP/s. It writes its logs to
research/followup/logs_large and its report to work_dirs/followup/large.md.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from research.systems.runs import write_log
from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.errors import InputError

from .plan import LARGE, Protocol, Run
from .report import write_report

LOGS = Path(__file__).with_name('logs')
REPORT = Path(__file__).with_name('README.md')
LARGE_LOGS, LARGE_REPORT = Path(__file__).with_name('logs_large'), Path('work_dirs/followup/large.md')


def complete(runs: Sequence[Run], jobs: int, device: str, logs: Path) -> None:
    """Run the runs that have no log yet, and write their logs."""
    remaining = [planned for planned in runs if not planned.read(logs)]
    print(f'{runs[0].stage}: {len(runs)} runs, {len(runs) - len(remaining)} of them finished', flush=True)
    if not remaining:
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context('spawn')) as pool:
        waiting = {pool.submit(planned.train, device): planned for planned in remaining}
        for result in as_completed(waiting):
            planned, log = waiting[result], result.result()
            write_log(logs / planned.stage, log)
            print(f'{planned.stage}, {log.arm}, seed {log.seed}: loss {log.loss:.4f}, '
                  f'{100 * log.accuracy:.2f} % right, {log.seconds:.0f} s', flush=True)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('research.followup', __doc__, 'python -m')
    options.add_argument('--large', action='store_true', help='XCiT-S12 on one GPU; see above')
    options.add_argument('--jobs', type=int, help='trainings at a time (default: one a core; --large: one)')
    options.add_argument('--report', action='store_true', help='write the report of the finished runs, and stop')
    args = options.parse_args(argv)
    device = 'cuda' if args.large else 'cpu'
    if args.large and not args.report and not torch.cuda.is_available():
        raise InputError('--large: PyTorch finds no GPU. Leave the option out')
    logs, report = (LARGE_LOGS, LARGE_REPORT) if args.large else (LOGS, REPORT)
    protocol = Protocol(logs, LARGE) if args.large else Protocol(logs)
    jobs = args.jobs or (1 if args.large else os.cpu_count() or 1)
    for runs in protocol.plan() if not args.report else ():
        complete(runs, jobs, device, logs)
    print(f'wrote {write_report(protocol, report)}')


if __name__ == '__main__':
    with command_line():
        main()
