"""Train small relatives of the paper's other systems, plain and conditioned: ListOps, a ViT, BERT.

    python -m research.systems [listops | vit | bert]

Each system (by default all three) is trained plain and conditioned in several forms, with several seeds, from the same
initial weights and for the same number of steps. A table lists for each arm the accuracy on held-out data, its
difference from plain with the 95 % interval of Student's t over pairs of runs with the same seed, condition numbers
before and after training, and the effective number of keys at the start. A finished run leaves a log and is not
repeated; the logs of three seeds are in the repository. Without logs a system takes about ten minutes on one thread,
the only one that it uses. --published trains ListOps at the size of the Long Range Arena, on a GPU if there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import torch

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.comparison import compute_seed_interval
from spec_mmdet.files import create_folder, display_path, one_line_write_errors

from . import SYSTEMS
from .listops import PublishedListOps
from .runs import ARMS, Log, System, read_log, train, write_log

LOGS = Path(__file__).with_name('logs')


def format_row(arm: str, logs: list[Log], plain: list[Log]) -> str:
    """Format an arm's line of the table: means over the seeds, accuracies in per cent."""
    ours, reference = ([100 * log.accuracy for log in some] for some in (logs, plain))
    spread = f'{stdev(ours):.2f}' if len(ours) > 1 else '-'
    difference, interval = '-', ''
    if logs is not plain:
        difference = f'{mean(ours) - mean(reference):+.2f}'
        if ends := compute_seed_interval(ours, reference, paired=True):
            interval = '{:+.2f} to {:+.2f}'.format(*ends)
    kappa = [mean(log.kappa[of][when] for log in logs) for of in ('whole', 'head') for when in (0, 1)]
    return (
        f'{arm:25}{mean(ours):>6.2f}{spread:>8}{difference:>8}{interval:>17}{mean(log.loss for log in logs):>8.3f}'
        + f'{mean(log.keys for log in logs):>8.1f}'
        + ''.join(f'{value:>9.3g}' for value in kappa)
    )


def format_table(name: str, system: System, runs: dict[str, list[Log]]) -> str:
    """Format the results of a system, one line for each arm, plain first."""
    seeds = [log.seed for log in runs['plain']]
    sigma = mean(log.lam for log in runs['lambda 2 sigma']) / 2
    return '\n'.join(
        [
            f'{name}: {system.steps} steps of {system.batch}, seeds {", ".join(map(str, seeds))}; {system.tests} '
            f'held-out {system.examples}; sigma: sigma_max at the start, {sigma:.3g}',
            *(f'{100 * accuracy:6.2f} % right: {rule}' for rule, accuracy in system.score_rules().items()),
            '',
            f'{"":25}{"%":>6}{"":8}{"from":>8}{"95 %, other":>17}{"":8}{"keys of":>8}'
            f'{"kappa, whole":>18}{"kappa, a head":>18}',
            f'{"arm":25}{"right":>6}{"spread":>8}{"plain":>8}{"seeds":>17}{"loss":>8}{system.tokens:>8}'
            + f'{"start":>9}{"end":>9}' * 2,
            *(format_row(arm, logs, runs['plain']) for arm, logs in runs.items()),
        ]
    )


def complete(name: str, system: System, seeds: int, folder: Path, device: str) -> None:
    """Run the runs of a system that have no log yet, and print its table.

    Raises:
        InputError: if its package is not installed, or a log is of another run or cannot be written.
    """
    if find_spec(system.needs) is None:
        raise InputError(f'{name} needs {system.needs}: pip install {system.needs}')
    planned = [(seed, arm) for seed in range(seeds) for arm in ARMS]
    logs = {key: log for key in planned if (log := read_log(folder, *key, system))}
    print(f'{name}: {len(logs)} of {len(planned)} runs finished, logs in {display_path(folder)}', flush=True)
    with one_line_write_errors(folder, folder), create_folder(folder):
        for seed, arm in planned:
            if (seed, arm) not in logs:
                log = logs[seed, arm] = train(system, arm, seed, device=device)
                write_log(folder, log)
                result = f'{100 * log.accuracy:.2f} % right, loss {log.loss:.3f}, {log.seconds:.0f} s'
                print(f'seed {seed}, {arm}: {result}', flush=True)
    print(f'\n{format_table(name, system, {arm: [logs[seed, arm] for seed in range(seeds)] for arm in ARMS})}\n')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('research.systems', __doc__, 'python -m')
    options.add_argument('system', nargs='?', choices=list(SYSTEMS), help='by default all of them')
    options.add_argument('--published', action='store_true', help='listops at its published size: on a GPU an '
                         'estimated 4 hours for 24 runs, most of them for drawing expressions; on one CPU core 2 hours '
                         'for each run')  # fmt: skip
    options.add_argument('--seeds', type=int, default=3, help='number of runs of each arm, from seed 0 (default: 3)')
    options.add_argument('--steps', type=int, help='of each training (default: those of the system, for ten minutes)')
    options.add_argument('--out', type=Path, default=LOGS, help='folder with a folder of logs for each system '
                         '(default: research/systems/logs)')  # fmt: skip
    args = options.parse_args(argv)
    torch.set_num_threads(1)  # for tensors this small more threads do not help, and they would change the rounding
    systems = {args.system: SYSTEMS[args.system]} if args.system else SYSTEMS
    if args.published:
        if args.system not in (None, 'listops'):
            raise InputError(f'--published: {args.system} has no published size here. Use listops')
        systems = dict(listops_published=PublishedListOps)
    for name, build in systems.items():
        system = build()
        if args.steps is not None:
            system = dataclasses.replace(system, steps=args.steps)
        if args.seeds < 1 or system.steps < 1:
            raise InputError('--seeds and --steps must be at least 1')
        device = 'cuda' if args.published and torch.cuda.is_available() else 'cpu'
        complete(name, system, args.seeds, args.out / name, device)


if __name__ == '__main__':
    with command_line():
        main()
