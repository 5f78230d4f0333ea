"""Compare trainings: a table over seeds, differences with their noise, curves and condition numbers, as a page and CSV.

    spec-mmdet compare [NAME=]RUN [NAME=]RUN... [--out DIR]

A RUN is the work directory of a training, with the report of its evaluation somewhere in it:

    spec-mmdet test RUN/CONFIG.py RUN/CHECKPOINT --report RUN/report

Runs of the same NAME are an arm: the same training with different seeds. Without names, those of the same config and
conditioning are. The first run's arm is what the others are measured from.

AP is COCO's, by pycocotools' rules, from the report's detections; all runs need the same annotation file. A difference
has two intervals of 95 %: one over images drawn anew a thousand times, the same for all runs, and one over seeds
(Student's t, by pairs where the arms have the same seeds; for that, an arm needs two runs). It is called beyond the
noise when neither holds 0. DIR (default: work_dirs/comparison) gets `index.html`, `runs.csv` and `differences.csv`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from mmengine.config import Config

from ..configs import find_run_config
from ..data.fitting import evaluators
from ..data.reading import AnnotationFile
from ..errors import InputError
from ..evaluation.bootstrap import ResampledAP, draw_weights
from ..evaluation.comparison import (
    DRAWS,
    Difference,
    Run,
    arms_of,
    differences,
    draw_curve,
    draw_differences,
    spread,
)
from ..evaluation.figures import embedded_figure
from ..evaluation.metrics import read_detections
from ..evaluation.pages import PAGE, page_of, require_free
from ..evaluation.report import rounded
from ..files import display_path, write_folder_atomically
from ..training.hooks import CONDITIONING, MEDIANS
from ..training.results import RUN, format_csv, read_scalars, select_metrics
from .common import parser

KINDS = dict(bbox='box', segm='mask')


def detections_of(folder: Path) -> dict[str, Path]:
    """The newest report's detections in a work directory, by kind.

    Raises:
        InputError: where there is no report.
    """
    found = sorted(folder.rglob('detections.bbox.json'), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f'{folder}: holds no report of an evaluation: spec-mmdet test {folder}/CONFIG.py '
                         f'{folder}/CHECKPOINT --report {folder}/report')  # fmt: skip
    return {kind: path for kind in KINDS if (path := found[-1].with_name(f'detections.{kind}.json')).is_file()}


def truth_of(folder: Path) -> Path:
    """The annotation file that a run is measured by, from its config.

    Raises:
        InputError: where there is no config, or several, or the file is not there.
    """
    config = find_run_config(folder)
    for evaluator in evaluators(Config.fromfile(config), 'test'):
        if 'ann_file' in evaluator:
            path = Path(evaluator.ann_file)
            if not path.is_file():
                raise InputError(f'{path}: no such file, from here; {config} is measured by it')
            return path
    raise InputError(f'{config}: has no ann_file in its test_evaluator')


def curves_of(folder: Path) -> dict[str, tuple[list, list]]:
    """Loss, AP, other metrics and condition numbers over the iterations, as the training recorded them."""
    curves: dict[str, tuple[list, list]] = {}

    def add(name: str, iteration: float, value: float) -> None:
        xs, ys = curves.setdefault(name, ([], []))
        xs.append(iteration)
        ys.append(value)

    last = 0
    for entry in read_scalars(folder):
        if 'loss' in entry:
            last = entry['iter']
            add('loss', last, entry['loss'])
        for key, value in select_metrics(entry).items():
            for kind, name in KINDS.items():
                if key == f'coco/{kind}_mAP':
                    add(f'{name} AP', last, value)
            if not key.startswith('coco/'):
                add(key, last, value)
        for name in MEDIANS:
            if f'{CONDITIONING}/{name}' in entry:
                add(name, entry['step'], entry[f'{CONDITIONING}/{name}'])
    return curves


def read_run(text: str, truths: dict[Path, AnnotationFile]) -> Run:
    """A run as the command line names it, measured; ``truths`` gets the annotations, by their file."""
    name, equals, rest = text.partition('=')
    folder = Path(rest if equals else text)
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder')
    files = detections_of(folder)
    path = truth_of(folder)
    if truths and path.resolve() not in truths:
        other = next(iter(truths))
        raise InputError(f'{folder} is measured by {path}, and the runs before it by {other}: not to be compared')
    facts = json.loads((folder / RUN).read_text()) if (folder / RUN).is_file() else {}
    arm = name if equals else f'{Path(facts.get("config") or folder.name).stem}, {facts.get("conditioning", "?")}'
    run = Run(arm, facts.get('seed'), folder, {}, {}, facts, curves_of(folder))
    with redirect_stdout(io.StringIO()):
        if path.resolve() not in truths:
            truths[path.resolve()] = AnnotationFile(str(path))
        for kind, file in files.items():
            results = read_detections(file, kind)
            if not results:
                raise InputError(f'{file}: is empty: this detector has found nothing')
            resampled = ResampledAP(truths[path.resolve()], results, kind)
            drawn = draw_weights(len(resampled.images), DRAWS)  # the same for all runs
            run.ap[kind] = resampled(np.ones(len(resampled.images)))
            run.drawn[kind] = np.array([resampled(row) for row in drawn])
    return run


def require_comparable(runs: Sequence[Run]) -> None:
    """Refuse what cannot be told apart, or has other kinds of AP.

    Raises:
        InputError: saying which.
    """
    if len(arms_of(runs)) < 2:
        raise InputError(f'all runs are of one arm ({runs[0].arm}): name them, as in plain=DIR conditioned=DIR')
    for arm, own in arms_of(runs).items():
        for one, other in zip(own, own[1:]):
            if one.seed == other.seed:
                raise InputError(f'{one.folder} and {other.folder} are both of the arm {arm} with the seed {one.seed}: '
                                 'name them, as in plain=DIR conditioned=DIR')  # fmt: skip
    if len({frozenset(run.ap) for run in runs}) > 1:
        raise InputError('some runs have masks and some have not')


def last(run: Run, name: str) -> str:
    """The last value of a curve, to be read."""
    return rounded(run.curves[name][1][-1]) if run.curves.get(name, ((), ()))[1] else '–'


def said(entry: Difference) -> str:
    """A difference in a sentence."""
    seeds = f'[{100 * entry.seeds[0]:+.1f}, {100 * entry.seeds[1]:+.1f}]' if entry.seeds else 'one seed'
    return (
        f'{entry.arm} - {entry.reference}: {KINDS[entry.kind]} AP {100 * entry.value:+.1f} points, other images '
        f'[{100 * entry.images[0]:+.1f}, {100 * entry.images[1]:+.1f}], other seeds {seeds}: {entry.verdict}'
    )


def as_page(runs: Sequence[Run], found: Sequence[Difference]) -> str:
    """The comparison as HTML."""
    curves = [
        *(draw_curve(runs, f'{name} AP') for name in KINDS.values()),
        draw_curve(runs, 'loss', log=True),
        *(draw_curve(runs, name, log=True) for name in MEDIANS[:4]),
    ]
    return page_of(
        'comparison',
        title=' against '.join(reversed(arms_of(runs))),
        arms=[
            dict(
                name=arm,
                seeds=', '.join(str(run.seed) for run in own),
                ap={KINDS[kind]: spread([run.ap[kind] for run in own]) for kind in own[0].ap},
                kappa=[rounded(float(np.median(values))) if (values := [
                    run.curves[name][1][-1] for run in own if name in run.curves]) else '–' for name in MEDIANS[:4]],
            )
            for arm, own in arms_of(runs).items()
        ],
        runs=[dict(row, folder=display_path(run.folder), facts=run.facts) for row, run in zip(table(runs), runs)],
        kinds=[KINDS[kind] for kind in runs[0].ap],
        kappas=MEDIANS[:4],
        sentences=[said(entry) for entry in found],
        intervals=embedded_figure(draw_differences(found, KINDS)),
        curves=[embedded_figure(figure) for figure in curves if figure],
    )  # fmt: skip


def table(runs: Sequence[Run]) -> list[dict]:
    """A row for each run."""
    return [
        dict(
            arm=run.arm,
            seed=run.seed,
            **{f'{KINDS[kind]} AP': round(value, 4) for kind, value in run.ap.items()},
            **{name: last(run, name) for name in MEDIANS[:4]},
            folder=run.folder,
        )
        for run in runs
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('compare', __doc__)
    options.add_argument('runs', nargs='+', metavar='[NAME=]RUN', help='work directories of trainings')
    options.add_argument('--out', type=Path, default=Path('work_dirs/comparison'), help='a folder that is new, empty, '
                         'or an earlier comparison (default: work_dirs/comparison)')  # fmt: skip
    args = options.parse_args(argv)
    require_free('--out', args.out, 'comparison')
    truths: dict[Path, AnnotationFile] = {}
    runs = [read_run(text, truths) for text in args.runs]
    require_comparable(runs)
    found = differences(runs)
    with write_folder_atomically(args.out) as aside:
        (aside / PAGE).write_text(as_page(runs, found), 'utf-8')
        (aside / 'runs.csv').write_text(format_csv(table(runs)))
        (aside / 'differences.csv').write_text(format_csv([
            dict(arm=d.arm, reference=d.reference, kind=KINDS[d.kind], difference=d.value, images_low=d.images[0],
                 images_high=d.images[1], seeds_low=d.seeds and d.seeds[0], seeds_high=d.seeds and d.seeds[1],
                 paired=d.paired, verdict=d.verdict)
            for d in found
        ]))  # fmt: skip
    for arm, own in arms_of(runs).items():
        ap = ', '.join(f'{KINDS[kind]} AP {spread([run.ap[kind] for run in own])}' for kind in own[0].ap)
        print(f'{arm}: {ap} ({len(own)} runs)')
    print(*map(said, found), sep='\n')
    print(f'wrote {args.out / PAGE}')
