"""Compare trainings: AP over seeds, differences with intervals, curves and condition numbers, as a page and CSV.

    spec-mmdet compare [NAME=]RUN [NAME=]RUN... [--out DIR]

A RUN is the work directory of a training with the report of its evaluation:

    spec-mmdet test RUN/CONFIG.py RUN/CHECKPOINT --report RUN/report

Runs of the same NAME form an arm: the same training with different seeds. Without names, runs of the same config and
conditioning form an arm. All arms are compared with that of the first run.

AP is computed as in pycocotools from the newest report's detections and its annotation file, which must be the same for
all runs. Each difference has two 95 % intervals: one over images (1000 resamples, the same for all runs), and one over
seeds (Student's t, paired if the arms have the same seeds; each arm needs two runs). A difference is beyond the noise
if neither interval contains 0. DIR gets `index.html`, `runs.csv` and `differences.csv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..status import show_status
from .common import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('compare', __doc__)
    options.add_argument('runs', nargs='+', metavar='[NAME=]RUN', help='work directories of trainings')
    options.add_argument('--out', type=Path, default=Path('work_dirs/comparison'), help='folder to write: new, empty, '
                         'or with an earlier comparison (default: work_dirs/comparison)')  # fmt: skip
    args = options.parse_args(argv)

    from ..errors import InputError
    from ..evaluation.comparison import (
        DRAWS,
        compare_arms,
        describe_arms,
        describe_difference,
        measure_runs,
        read_run,
        require_comparable,
        write_comparison,
    )
    from ..evaluation.pages import PAGE, require_free
    from ..files import write_folder_atomically
    from ..training.results import read_curves, read_facts

    require_free('--out', args.out, 'comparison')
    runs = []
    for text in args.runs:
        name, path = text.split('=', 1) if '=' in text and not Path(text).is_dir() else ('', text)
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f'{folder}: no such folder. Pass the work directory of a training')
        runs.append(read_run(folder, name, read_facts(folder), read_curves(folder)))
    with show_status('comparing detections'):
        require_comparable(runs)
    measure_runs(runs, DRAWS)
    found = compare_arms(runs)
    with show_status('writing the page'), write_folder_atomically(args.out) as temporary:
        write_comparison(temporary, runs, found)
    print(*describe_arms(runs), *map(describe_difference, found), f'wrote {args.out / PAGE}', sep='\n')
