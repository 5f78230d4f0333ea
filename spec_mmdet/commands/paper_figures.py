"""The paper's picture of conditioning during training, over the demo's: plain against conditioned.

Run by `make paper-figures`. Trains the demo's detector twice from the same start and writes work_dirs/paper_figures:
the smallest singular value and the condition number of W_Q, W_K, W_V (of W + C where there is a correction) and of
the attention's Jacobian, every ten iterations, in the median over the layers and from the least to the greatest; and
what the training makes of it.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from ..files import replace_folder, write_atomically
from ..training.results import read_scalars
from .common import parser, run_command
from .demo import CONFIG, DATA

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

WORK = Path('work_dirs/paper_figures')
RUNS = {'plain': ['model.backbone.conditioning=None'], 'conditioned': []}


def series(name: str, matrix: str, figure: str) -> tuple[list[int], list[list[float]]]:
    """A figure of a run's corrected matrix, or of the plain one where there is none: each step's and layer's."""
    values: dict[int, list[float]] = {}
    with (WORK / name / 'conditioning.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            if row['matrix'] == matrix:
                values.setdefault(int(row['iter']), []).append(float(row[f'conditioned_{figure}'] or row[figure]))
    return list(values), list(values.values())


def main(argv: Sequence[str] | None = None) -> None:
    parser('paper-figures', __doc__).parse_args(argv)
    start = time.time()
    with replace_folder(WORK):
        run_command('shapes', DATA)
        for name, options in RUNS.items():
            options = [*options, 'default_hooks.conditioning.interval=10', 'default_hooks.conditioning.heads=4']
            run_command('train', CONFIG, '--work-dir', WORK / name, '--cfg-options', *options)

        panels = [('sigma_min', 'QKV'), ('kappa', 'Q'), ('kappa', 'K'), ('kappa', 'V'), ('kappa', 'J')]
        figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout='constrained')
        print(f'\n{"":14}{"":12}{"first":>12}{"last":>12}   (median over the layers)')
        for color, name in enumerate(RUNS):
            entries = read_scalars(WORK / name)
            for axis, (kind, matrices) in zip(axes.flat, panels):
                steps, values = series(name, matrices[0], kind)
                for matrix in matrices[1:]:
                    values = [a + b for a, b in zip(values, series(name, matrix, kind)[1])]
                medians = [statistics.median(layers) for layers in values]
                axis.plot(steps, medians, f'C{color}', label=name)
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=f'C{color}', alpha=0.15)
                what = {'QKV': 'sigma_min W', 'J': 'kappa J'}.get(matrices, f'kappa W_{matrices}')
                print(f'{name:14}{what:12}{medians[0]:>12.4g}{medians[-1]:>12.4g}')
            epochs = [entry for entry in entries if 'coco/bbox_mAP' in entry]
            for kind, line in (('bbox', '-'), ('segm', '--')):
                scores = [entry[f'coco/{kind}_mAP'] for entry in epochs]
                label = f'{name}, {dict(bbox="box", segm="mask")[kind]} AP'
                axes[1, 2].plot([entry['step'] for entry in epochs], scores, f'C{color}{line}', marker='o', label=label)
                print(f'{label:26}{scores[0]:>12.3f}{scores[-1]:>12.3f}')
        for axis, (kind, matrix) in zip(axes.flat, panels):
            title = r"$\kappa$ of the attention's Jacobian" if matrix == 'J' else rf'$\kappa$ of $W_{matrix}$'
            axis.set(yscale='log', xlabel='iteration', title=title if kind == 'kappa' else 'smallest singular value')
            axis.legend()
        axes[1, 2].set(xlabel='epoch', xticks=[entry['step'] for entry in epochs], title='images not trained on')
        axes[1, 2].legend()
        with write_atomically(WORK / 'conditioning.png') as aside:
            figure.savefig(aside, dpi=80, format='png')
    print(f'\nwrote {WORK / "conditioning.png"}; took {time.time() - start:.0f} s')
