"""Compare the AP of several detectors on the same images: differences, and their noise from images and seeds."""

from __future__ import annotations

import gc
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from ..data.reading import AnnotationFile
from ..errors import InputError
from ..files import compute_digest, display_path, format_csv
from .bootstrap import ResampledAP, draw_weights
from .metrics import read_detections
from .pages import DATA, PAGE, render_page
from .plots import add_legend, embed_figure, start_plot
from .report import format_kappa

KINDS = dict(bbox='box', segm='mask')
KAPPAS = ('kappa_Q', 'kappa_K', 'kappa_V', 'kappa_J')  # the condition numbers among a run's curves
PROCESSES = 4  # maximum; each holds one run's detections in memory
DRAWS = 1000  # resamples of the images
LEVEL = 0.95
NO_DETECTIONS = 'contains no detections. Compare detectors, by AP; read other reports'


@dataclass
class Run:
    """An evaluated training run."""

    arm: str  # its group; runs of an arm differ only in their seed
    seed: int | None
    folder: Path  # the work directory
    ap: dict[str, float] = field(default_factory=dict)  # by kind: 'bbox' and, with masks, 'segm'
    drawn: dict[str, np.ndarray] = field(default_factory=dict)  # AP on each resample of the images, shape (draws,)
    facts: dict = field(default_factory=dict)  # metadata that the training recorded
    curves: dict[str, tuple[list, list]] = field(default_factory=dict)  # iterations and values by name
    detections: dict[str, Path] = field(default_factory=dict)  # files of the newest report by kind
    truth: Path | None = None  # annotation file of the evaluation
    classes: list[str] = field(default_factory=list)  # the evaluated ones
    weights: str = ''  # digest of the evaluated weights


@dataclass
class Difference:
    """The difference between two arms' mean AP."""

    arm: str
    reference: str
    kind: str
    value: float  # arm minus reference
    images: tuple[float, float]  # 95 % interval over resampled images, for the same detectors
    seeds: tuple[float, float] | None  # 95 % interval over seeds, by Student's t; None if an arm has only one run
    paired: bool  # by seed

    @property
    def verdict(self) -> str:
        """The conclusion from both intervals."""
        of_images = self.images[0] <= 0 <= self.images[1]
        of_seeds = self.seeds is not None and self.seeds[0] <= 0 <= self.seeds[1]
        if of_images or of_seeds:
            noise = ' and '.join(['images'] * of_images + ['seeds'] * of_seeds)
            return f'within the noise of the {noise}'
        if self.seeds is None:
            return 'beyond the noise of the images; the noise of the seeds is unknown with one run per arm'
        return 'beyond the noise'


def read_run(folder: Path, name: str, facts: dict, curves: dict[str, tuple[list, list]]) -> Run:
    """Find a run's newest report and its annotation file.

    Args:
        folder: the work directory.
        name: name of the arm; '' uses the config and the conditioning.
        facts, curves: records of the training.

    Raises:
        InputError: if there is no report, its annotation file is missing or has changed, or its weights are of another
            training.
    """
    advice = f'Run "spec-mmdet test {folder}/CONFIG.py {folder}/CHECKPOINT --report {folder}/report"'
    found = sorted(folder.rglob(DATA), key=lambda path: path.stat().st_mtime)
    if not found and (pages := [*folder.rglob(PAGE)]):
        raise InputError(f'{pages[0].parent}: {NO_DETECTIONS}')
    if not found:
        raise InputError(f'{folder}: contains no report of an evaluation ({DATA}). {advice}')
    record = json.loads(found[-1].read_text('utf-8'))
    truth = Path(record['annotations'])
    if not truth.is_file() or compute_digest(truth) != record['sha256']:
        fault = 'has changed since' if truth.is_file() else 'does not exist'
        raise InputError(f'{truth}: the annotation file of {found[-1].parent} {fault}. {advice}')
    files = {kind: path for kind in KINDS if (path := found[-1].with_name(f'detections.{kind}.json')).is_file()}
    if not files:
        raise InputError(f'{found[-1].parent}: {NO_DETECTIONS}')
    arm = name or f'{Path(facts.get("config") or folder.name).stem}, {facts.get("conditioning", "?")}'
    weights = record['weights']
    if None not in (seeds := (facts.get('seed'), weights['seed'])) and seeds[0] != seeds[1]:
        raise InputError(f'{found[-1].parent}: its weights are of a training with the seed {seeds[1]}, but that of '
                         f'{folder} has the seed {seeds[0]}. {advice}')  # fmt: skip
    run = Run(arm, facts.get('seed'), folder, facts=facts, curves=curves, detections=files, truth=truth)
    run.classes, run.weights = record['classes'], weights['sha256']
    return run


def require_comparable(runs: Sequence[Run]) -> None:
    """Raise an InputError unless there are several arms without copied runs, of the same data, classes and kinds."""
    arms = group_runs(runs)
    if len(arms) < 2:
        raise InputError(f'all runs belong to one arm ({runs[0].arm}). Name the arms, as in plain=DIR conditioned=DIR')
    for arm, members in arms.items():
        for other, run in combinations(members, 2):
            copied = is_copy(run, other)
            if copied or run.seed == other.seed:
                fault = 'copies of one run' if copied else f'both of the arm {arm}'
                raise InputError(f'{other.folder} and {run.folder} are {fault} with the seed {other.seed}. Leave one '
                                 'out, or name the arms, as in plain=DIR conditioned=DIR')  # fmt: skip
    if len({frozenset(run.detections) for run in runs}) > 1:
        raise InputError('some runs have masks and others do not. Compare runs of the same kind')
    digests = {path: compute_digest(path) for path in {run.truth for run in runs}}
    for run in runs:
        if set(run.classes) != set(runs[0].classes):
            raise InputError(f'{run.folder} and {runs[0].folder} were evaluated on different classes. Evaluate both on '
                             'the same classes')  # fmt: skip
        if digests[run.truth] != digests[runs[0].truth]:
            raise InputError(f'{run.folder} was evaluated on {run.truth}, and {runs[0].folder} on {runs[0].truth}. '
                             'Evaluate both on the same annotation file')  # fmt: skip


def is_copy(run: Run, other: Run) -> bool:
    """Return whether two runs started in the same second with the same seed, or have the same weights or detections."""
    began, other_began = ((r.facts.get('started'), r.seed) for r in (run, other))
    digest, other_digest = (compute_digest(next(iter(r.detections.values()))) for r in (run, other))
    return began == other_began != (None, run.seed) or run.weights == other.weights or digest == other_digest


def measure_runs(runs: Sequence[Run], draws: int = DRAWS) -> None:
    """Compute AP of all runs on all images and on ``draws`` resamples of them, in several processes; changes ``runs``.

    Raises:
        InputError: if detections do not match the annotation file, or memory is insufficient.
    """
    truth = AnnotationFile(str(runs[0].truth))
    categories = truth.getCatIds(catNms=runs[0].classes) or None  # None: all
    jobs = [(run, kind) for kind in reversed(KINDS) for run in runs if kind in run.detections]
    # Forked processes share the annotations; others receive a copy.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else None)
    workers = min(PROCESSES, len(jobs), multiprocessing.cpu_count())
    with ProcessPoolExecutor(workers, context, _set_truth, (truth, categories, draws)) as pool:
        futures = {pool.submit(measure_detections, run.detections[kind], kind): (run, kind) for run, kind in jobs}
        try:
            for future in tqdm(as_completed(futures), 'resampling', len(jobs), leave=False, disable=None):
                run, kind = futures[future]
                run.ap[kind], run.drawn[kind] = future.result()
        except BrokenProcessPool as error:
            raise InputError(
                'a process that computes AP was killed, probably for lack of memory. Close other programs'
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for run in runs:
        run.ap = {kind: run.ap[kind] for kind in KINDS if kind in run.ap}


_shared: tuple[AnnotationFile, list | None, int]  # annotations, categories, number of draws


def _set_truth(*values: object) -> None:
    global _shared
    _shared = values
    gc.disable()  # searching for reference cycles, of which there are none, would double the time to read detections


def measure_detections(path: Path, kind: str) -> tuple[float, np.ndarray]:
    """Compute AP of a file of detections, and AP on each bootstrap sample of the images, shape (draws,)."""
    truth, categories, draws = _shared
    results = read_detections(path, kind)
    if not results:
        raise InputError(f'{path}: contains no detections. Leave this run out')
    truth.number_detections(results)
    resampled = ResampledAP(truth, results, kind, categories)
    del results
    images = len(resampled.images)
    ap, *drawn = resampled(np.vstack([np.ones(images, int), draw_weights(images, draws)]))
    return float(ap), np.array(drawn)


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by arm, arms in the order of their first run, the runs of an arm by seed."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return {arm: sorted(members, key=lambda run: (run.seed is None, run.seed)) for arm, members in arms.items()}


def compute_seed_interval(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference of two means over seeds, by Student's t; None for a single run.

    Args:
        ours, theirs: a metric of each run of the two arms.
        paired: whether both arms have the same seeds, in the same order.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    values = [np.subtract(ours, theirs)] if paired else [ours, theirs]
    if not any(map(np.std, values)):  # t is undefined
        return (float(np.mean(ours) - np.mean(theirs)),) * 2
    test = stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    return tuple(map(float, test.confidence_interval(LEVEL)))


def compare_two_arms(arm: Sequence[Run], reference: Sequence[Run], kind: str) -> Difference:
    """Compute the difference between two arms, and its intervals."""
    ours, theirs = ([run.ap[kind] for run in runs] for runs in (arm, reference))
    drawn = np.mean([run.drawn[kind] for run in arm], axis=0) - np.mean([run.drawn[kind] for run in reference], axis=0)
    tail = (1 - LEVEL) / 2
    images = tuple(float(value) for value in np.nanquantile(drawn, [tail, 1 - tail]))
    paired = [run.seed for run in arm] == [run.seed for run in reference]
    seeds = compute_seed_interval(ours, theirs, paired)
    return Difference(arm[0].arm, reference[0].arm, kind, float(np.mean(ours) - np.mean(theirs)), images, seeds, paired)


def compare_arms(runs: Sequence[Run]) -> list[Difference]:
    """Compute the difference of every other arm from the first, for each kind of AP."""
    (_, reference), *others = group_runs(runs).items()
    return [compare_two_arms(arm, reference, kind) for kind in reference[0].ap for _, arm in others]


def format_spread(values: Sequence[float], scale: float = 100) -> str:
    """Format mean ± standard deviation over seeds, times ``scale``."""
    mean = f'{scale * np.mean(values):.1f}'
    return f'{mean} ± {scale * np.std(values, ddof=1):.1f}' if len(values) > 1 else mean


def draw_differences(found: Sequence[Difference]) -> Figure:
    """Plot every difference with its two intervals, in points of AP."""
    figure = Figure(figsize=(5.6, 1.2 + 0.55 * len(found)), layout='constrained')
    axis = figure.subplots()
    for row, entry in enumerate(reversed(found)):
        for place, interval, colour in ((0.12, entry.images, 'C0'), (-0.12, entry.seeds, 'C1')):
            if interval:
                axis.plot([100 * end for end in interval], [row + place] * 2, color=colour, linewidth=3)
        axis.plot(100 * entry.value, row, 'ko', markersize=5)
    axis.axvline(0, color='gray', linewidth=1)
    axis.set_yticks(range(len(found)), [f'{entry.arm}\n{KINDS[entry.kind]} AP' for entry in reversed(found)])
    axis.plot([], [], color='C0', linewidth=3, label='95 % over images')
    axis.plot([], [], color='C1', linewidth=3, label='95 % over seeds')
    axis.set(xlabel='points of AP relative to ' + found[0].reference, ylim=(-0.6, len(found) - 0.4))
    axis.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axis.grid(alpha=0.3)
    return figure


def draw_curve(runs: Sequence[Run], name: str, log: bool = False) -> Figure | None:
    """Plot a curve of all runs against the iteration, with one colour per arm; None if no run has it."""
    colours = {arm: f'C{i % 10}' for i, arm in enumerate(group_runs(runs))}
    if not any(name in run.curves for run in runs):
        return None
    figure, axis = start_plot(name.replace('_', ' '), xlabel='iteration', **(dict(yscale='log') if log else {}))
    for run in runs:
        axis.plot(*run.curves.get(name, ([], [])), color=colours[run.arm], marker='.', linewidth=1)
    for arm, colour in colours.items():
        axis.plot([], [], color=colour, label=arm)
    add_legend(axis)
    return figure


def describe_difference(entry: Difference) -> str:
    """Describe a difference in a sentence."""
    seeds = f'[{100 * entry.seeds[0]:+.1f}, {100 * entry.seeds[1]:+.1f}]' if entry.seeds else 'one seed'
    return (
        f'{entry.arm} - {entry.reference}: {KINDS[entry.kind]} AP {100 * entry.value:+.1f} points, 95 % over images '
        f'[{100 * entry.images[0]:+.1f}, {100 * entry.images[1]:+.1f}], over seeds {seeds}: {entry.verdict}'
    )


def describe_arms(runs: Sequence[Run]) -> list[str]:
    """Describe each arm's AP in one line."""
    lines = []
    for arm, members in group_runs(runs).items():
        parts = (f'{KINDS[kind]} AP {format_spread([run.ap[kind] for run in members])}' for kind in members[0].ap)
        lines.append(f'{arm}: {", ".join(parts)} ({len(members)} runs)')
    return lines


def format_last(runs: Sequence[Run], name: str) -> str:
    """Format the median of the runs' last values of a curve, or a dash if there are none."""
    values = [run.curves[name][1][-1] for run in runs if run.curves.get(name, ((), ()))[1]]
    return format_kappa(float(np.median(values))) if values else '–'


def tabulate(runs: Sequence[Run]) -> list[dict]:
    """Return a table row for each run."""
    return [
        dict(
            arm=run.arm,
            seed=run.seed,
            **{f'{KINDS[kind]} AP': round(value, 4) for kind, value in run.ap.items()},
            **{name: format_last([run], name) for name in KAPPAS},
            folder=run.folder,
        )
        for run in runs
    ]


def build_page(runs: Sequence[Run], found: Sequence[Difference]) -> str:
    """Build the comparison's page, HTML."""
    names = [*(f'{name} AP' for name in KINDS.values()), 'loss', *KAPPAS]
    curves = {name: draw_curve(runs, name, log=not name.endswith('AP')) for name in names}
    return render_page(
        'comparison',
        'comparison',
        title=' against '.join(reversed(group_runs(runs))),
        arms=[
            dict(
                name=arm,
                seeds=', '.join(str(run.seed) for run in members),
                ap={KINDS[kind]: format_spread([run.ap[kind] for run in members]) for kind in members[0].ap},
                kappa=[format_last(members, name) for name in KAPPAS],
            )
            for arm, members in group_runs(runs).items()
        ],
        runs=[dict(row, folder=display_path(run.folder), facts=run.facts) for row, run in zip(tabulate(runs), runs)],
        kinds=[KINDS[kind] for kind in runs[0].ap],
        kappas=KAPPAS,
        draws=len(next(iter(runs[0].drawn.values()))),
        sentences=[describe_difference(entry) for entry in found],
        intervals=embed_figure(draw_differences(found)),
        curves=[dict(embed_figure(figure), name=name) for name, figure in curves.items() if figure],
    )


def write_comparison(folder: Path, runs: Sequence[Run], found: Sequence[Difference]) -> None:
    """Write a comparison's page, 'runs.csv' and 'differences.csv' into a folder."""
    (folder / PAGE).write_text(build_page(runs, found), 'utf-8')
    (folder / 'runs.csv').write_text(format_csv(tabulate(runs)), 'utf-8')
    rows = [
        dict(arm=d.arm, reference=d.reference, kind=KINDS[d.kind], difference=d.value, images_low=d.images[0],
             images_high=d.images[1], seeds_low=d.seeds and d.seeds[0], seeds_high=d.seeds and d.seeds[1],
             paired=d.paired, verdict=d.verdict)
        for d in found
    ]  # fmt: skip
    (folder / 'differences.csv').write_text(format_csv(rows), 'utf-8')
