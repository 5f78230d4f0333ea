"""Draw the paper's figure of condition numbers during training, for the demo's detector, plain and conditioned.

    python -m research.paper_figures

Trains the demo's detector twice from the same start and writes work_dirs/paper_figures/conditioning.png: the smallest
singular value and the condition number of W_Q, W_K, W_V (of W + C where there is a correction) and of the attention's
Jacobian, every ten iterations, as median and range over the layers; and the AP after each epoch.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser, run_command
from spec_mmdet.data.shapes import write_shapes
from spec_mmdet.evaluation.plots import add_legend
from spec_mmdet.files import replace_folder, write_atomically
from spec_mmdet.training.results import read_scalars

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

CONFIG, DATA, WORK = 'xcit_spec_shapes', Path('data/shapes'), Path('work_dirs/paper_figures')
RUNS = {'plain': ['model.backbone.conditioning=None'], 'conditioned': []}


def read_series(name: str, matrix: str, quantity: str) -> tuple[list[int], list[list[float]]]:
    """Read a quantity of a run's matrices, of W + C where there is a C.

    Returns:
        The iterations, and for each of them the values of all layers.
    """
    values: dict[int, list[float]] = {}
    with (WORK / name / 'conditioning.csv').open(newline='') as file:
        for row in csv.DictReader(file):
            if row['matrix'] == matrix:
                values.setdefault(int(row['iter']), []).append(float(row[f'conditioned_{quantity}'] or row[quantity]))
    return list(values), list(values.values())


def main(argv: Sequence[str] | None = None) -> None:
    make_parser('research.paper_figures', __doc__, 'python -m').parse_args(argv)
    start = time.time()
    with replace_folder(WORK):
        write_shapes(DATA)
        for name, options in RUNS.items():
            options = [*options, 'default_hooks.conditioning.interval=10', 'default_hooks.conditioning.heads=4']
            run_command('train', CONFIG, '--work-dir', WORK / name, '--cfg-options', *options)

        panels = [('sigma_min', 'QKV'), ('kappa', 'Q'), ('kappa', 'K'), ('kappa', 'V'), ('kappa', 'J')]
        figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), layout='constrained')
        print(f'\n{"":14}{"":12}{"first":>12}{"last":>12}   (median over the layers)')
        for color, name in enumerate(RUNS):
            entries = read_scalars(WORK / name)
            for axis, (kind, matrices) in zip(axes.flat, panels):
                steps, values = read_series(name, matrices[0], kind)
                for matrix in matrices[1:]:
                    values = [a + b for a, b in zip(values, read_series(name, matrix, kind)[1])]
                medians = [statistics.median(layers) for layers in values]
                axis.plot(steps, medians, f'C{color}', label=name)
                axis.fill_between(steps, list(map(min, values)), list(map(max, values)), color=f'C{color}', alpha=0.15)
                label = {'QKV': 'sigma_min W', 'J': 'kappa J'}.get(matrices, f'kappa W_{matrices}')
                print(f'{name:14}{label:12}{medians[0]:>12.4g}{medians[-1]:>12.4g}')
            epochs = [entry for entry in entries if 'coco/bbox_mAP' in entry]
            for kind, line in (('bbox', '-'), ('segm', '--')):
                scores = [entry[f'coco/{kind}_mAP'] for entry in epochs]
                label = f'{name}, {dict(bbox="box", segm="mask")[kind]} AP'
                axes[1, 2].plot([entry['step'] for entry in epochs], scores, f'C{color}{line}', marker='o', label=label)
                print(f'{label:26}{scores[0]:>12.3f}{scores[-1]:>12.3f}')
        for axis, (kind, matrix) in zip(axes.flat, panels):
            title = r"$\kappa$ of the attention's Jacobian" if matrix == 'J' else rf'$\kappa$ of $W_{matrix}$'
            axis.set(yscale='log', xlabel='iteration', title=title if kind == 'kappa' else 'smallest singular value')
            add_legend(axis)
        axes[1, 2].set(xlabel='epoch', xticks=[entry['step'] for entry in epochs], title='validation images')
        add_legend(axes[1, 2])
        with write_atomically(WORK / 'conditioning.png') as file:
            figure.savefig(file, dpi=80, format='png')
    print(f'\nwrote {WORK / "conditioning.png"}; took {time.time() - start:.0f} s')


if __name__ == '__main__':
    with command_line():
        main()
