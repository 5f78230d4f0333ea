"""The paper's other systems, small: a Nyströmformer on ListOps, a ViT on images, BERT on masked characters.

    spec-mmdet systems listops

trains one of them plain and conditioned in several forms, each from the same initial weights and for as many steps,
with several seeds, and prints a table: the accuracy on what was held out, and its difference from plain with the
interval of Student's t over pairs of runs with the same seed; condition numbers before and after training; and to how
many keys a query attends at the start. A run leaves a log when it has finished, and is not run again then. All of it
takes about ten minutes on one thread, which is all that it uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import torch

from ..errors import InputError
from ..evaluation.comparison import interval_of_seeds
from ..files import create_folder, display_path, one_line_write_errors
from ..systems import SYSTEMS
from ..systems.runs import ARMS, Log, System, read_log, run, write_log
from .common import parser


def row(arm: str, logs: list[Log], plain: list[Log]) -> str:
    """An arm's line of the table: means over the seeds, of accuracies in per cent."""
    ours, theirs = ([100 * log.accuracy for log in own] for own in (logs, plain))
    spread = f'{stdev(ours):.2f}' if len(ours) > 1 else '-'
    apart, interval = '-', ''
    if logs is not plain:
        apart = f'{mean(ours) - mean(theirs):+.2f}'
        if ends := interval_of_seeds(ours, theirs, paired=True):
            interval = '{:+.2f} to {:+.2f}'.format(*ends)
    kappa = [mean(log.kappa[of][when] for log in logs) for of in ('whole', 'head') for when in (0, 1)]
    return (
        f'{arm:25}{mean(ours):>6.2f}{spread:>8}{apart:>8}{interval:>17}{mean(log.loss for log in logs):>8.3f}'
        + f'{mean(log.keys for log in logs):>8.1f}'
        + ''.join(f'{value:>9.3g}' for value in kappa)
    )


def table(name: str, system: System, runs: dict[str, list[Log]]) -> str:
    """What the runs came to, an arm a line, plain first."""
    seeds = [log.seed for log in runs['plain']]
    sigma = mean(log.lam for log in runs['lambda 2 sigma']) / 2
    return '\n'.join(
        [
            f'{name}: {system.steps} steps of {system.batch}, seeds {", ".join(map(str, seeds))}; tested on '
            f'{system.tests} {system.examples} not trained on; sigma: sigma_max at the start, {sigma:.3g}',
            *(f'{100 * right:6.2f} % right: {rule}' for rule, right in system.rules().items()),
            '',
            f'{"":25}{"%":>6}{"":8}{"from":>8}{"95 %, other":>17}{"":8}{"keys of":>8}'
            f'{"kappa, whole":>18}{"kappa, a head":>18}',
            f'{"arm":25}{"right":>6}{"spread":>8}{"plain":>8}{"seeds":>17}{"loss":>8}{system.tokens:>8}'
            + f'{"start":>9}{"end":>9}' * 2,
            *(row(arm, logs, runs['plain']) for arm, logs in runs.items()),
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('systems', __doc__)
    options.add_argument('system', choices=list(SYSTEMS))
    options.add_argument('--seeds', type=int, default=3, help='how many of each arm, from seed 0 on (default: 3)')
    options.add_argument('--steps', type=int, help='of each training (default: those of the system, for ten minutes)')
    options.add_argument('--out', type=Path, help='where the logs are (default: work_dirs/systems/SYSTEM)')
    args = options.parse_args(argv)
    system = SYSTEMS[args.system]()
    if args.steps is not None:
        system = dataclasses.replace(system, steps=args.steps)
    if args.seeds < 1 or system.steps < 1:
        raise InputError('--seeds and --steps must be at least 1')
    if find_spec(system.needs) is None:
        raise InputError(f'{args.system} needs {system.needs}: pip install {system.needs}')
    folder = args.out or Path('work_dirs', 'systems', args.system)
    planned = [(seed, arm) for seed in range(args.seeds) for arm in ARMS]
    logs = {key: log for key in planned if (log := read_log(folder, *key, system))}
    if logs:
        print(f'{len(logs)} of {len(planned)} runs have their logs in {display_path(folder)}', flush=True)
    torch.set_num_threads(1)  # for tensors this small more do not help, and what they round would differ
    with one_line_write_errors(folder, folder), create_folder(folder):
        for seed, arm in planned:
            if (seed, arm) not in logs:
                log = logs[seed, arm] = run(system, arm, seed)
                write_log(folder, log)
                told = f'{100 * log.accuracy:.2f} % right, loss {log.loss:.3f}, {log.seconds:.0f} s'
                print(f'seed {seed}, {arm}: {told}', flush=True)
    print(f'\n{table(args.system, system, {arm: [logs[seed, arm] for seed in range(args.seeds)] for arm in ARMS})}')
    print(f'\nlogs of the runs: {display_path(folder)}')
