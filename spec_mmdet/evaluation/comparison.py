"""Several detectors' AP on the same images: how much is the detector, and how much is chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

DRAWS = 1000  # of the images
LEVEL = 0.95


@dataclass
class Run:
    """A training that was evaluated.

    Attributes:
        arm: what it is one of; runs of an arm differ in their seed alone.
        seed: of its training.
        folder: its work directory.
        ap: by kind, 'bbox' and, with masks, 'segm'.
        drawn: the same on each draw of the images, shape (draws,).
        facts: what the training said of itself.
        curves: by name, iterations and values.
    """

    arm: str
    seed: int | None
    folder: Path
    ap: dict[str, float]
    drawn: dict[str, np.ndarray]
    facts: dict = field(default_factory=dict)
    curves: dict[str, tuple[list, list]] = field(default_factory=dict)


@dataclass
class Difference:
    """Of an arm's mean AP from another's.

    Attributes:
        arm, reference: their names.
        kind: of AP.
        value: arm minus reference.
        images: the interval that other images would leave it in, from drawing them again: the detectors stay the same.
        seeds: the interval that other seeds would leave its mean in, by Student's t (paired, where both arms have the
            same seeds); None where an arm has one run.
        paired: whether it is by pairs of runs with the same seed.
    """

    arm: str
    reference: str
    kind: str
    value: float
    images: tuple[float, float]
    seeds: tuple[float, float] | None
    paired: bool

    @property
    def verdict(self) -> str:
        """What can be said of it."""
        of_images = self.images[0] <= 0 <= self.images[1]
        of_seeds = self.seeds is not None and self.seeds[0] <= 0 <= self.seeds[1]
        if of_images or of_seeds:
            noise = ' and '.join(['images'] * of_images + ['seeds'] * of_seeds)
            return f'within the noise of the {noise}'
        if self.seeds is None:
            return 'beyond the noise of the images; what another seed gives is not known from one run'
        return 'beyond the noise'


def arms_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by their arms, by rising seed; arms in the order of the runs."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return {arm: sorted(own, key=lambda run: (run.seed is None, run.seed)) for arm, own in arms.items()}


def interval_of_seeds(ours: Sequence[float], theirs: Sequence[float], paired: bool) -> tuple[float, float] | None:
    """The interval that other seeds would leave a difference of means in, by Student's t; None for a single run.

    Args:
        ours, theirs: a figure of each run of two arms.
        paired: whether they are by the same seeds, in the same order.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    apart = np.subtract(ours, theirs) if paired else None
    if paired and not apart.std():  # of which there is no t
        return float(apart[0]), float(apart[0])
    test = stats.ttest_rel(ours, theirs) if paired else stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = map(float, test.confidence_interval(LEVEL))
    if math.isnan(low) or math.isnan(high):  # no spread at all in either arm
        return (float(np.mean(ours) - np.mean(theirs)),) * 2
    return low, high


def difference(arm: Sequence[Run], reference: Sequence[Run], kind: str) -> Difference:
    """How far two arms are apart."""
    ours, theirs = ([run.ap[kind] for run in runs] for runs in (arm, reference))
    drawn = np.mean([run.drawn[kind] for run in arm], axis=0) - np.mean([run.drawn[kind] for run in reference], axis=0)
    tail = (1 - LEVEL) / 2
    images = tuple(float(value) for value in np.nanquantile(drawn, [tail, 1 - tail]))
    paired = [run.seed for run in arm] == [run.seed for run in reference]
    seeds = interval_of_seeds(ours, theirs, paired)
    return Difference(arm[0].arm, reference[0].arm, kind, float(np.mean(ours) - np.mean(theirs)), images, seeds, paired)


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Of every arm from the first."""
    (_, reference), *others = arms_of(runs).items()
    return [difference(arm, reference, kind) for kind in reference[0].ap for _, arm in others]


def spread(values: Sequence[float], scale: float = 100) -> str:
    """Mean and standard deviation over seeds, in points or by another scale."""
    mean = f'{scale * np.mean(values):.1f}'
    return f'{mean} ± {scale * np.std(values, ddof=1):.1f}' if len(values) > 1 else mean


def draw_differences(found: Sequence[Difference], names: dict[str, str]) -> Figure:
    """Every difference with its two intervals, in points of AP."""
    figure = Figure(figsize=(5.6, 1.2 + 0.55 * len(found)), layout='constrained')
    axis = figure.subplots()
    for row, entry in enumerate(reversed(found)):
        for place, interval, colour in ((0.12, entry.images, 'C0'), (-0.12, entry.seeds, 'C1')):
            if interval:
                axis.plot([100 * end for end in interval], [row + place] * 2, color=colour, linewidth=3)
        axis.plot(100 * entry.value, row, 'ko', markersize=5)
    axis.axvline(0, color='gray', linewidth=1)
    axis.set_yticks(range(len(found)), [f'{entry.arm}\n{names[entry.kind]} AP' for entry in reversed(found)])
    axis.plot([], [], color='C0', linewidth=3, label='95 %, other images')
    axis.plot([], [], color='C1', linewidth=3, label='95 %, other seeds')
    axis.set(xlabel='points of AP from ' + found[0].reference, ylim=(-0.6, len(found) - 0.4))
    axis.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False)
    axis.grid(alpha=0.3)
    return figure


def draw_curve(runs: Sequence[Run], name: str, log: bool = False) -> Figure | None:
    """A curve over the iterations, an arm a colour; None where no run has it."""
    colours = {arm: f'C{i % 10}' for i, arm in enumerate(arms_of(runs))}
    if not any(name in run.curves for run in runs):
        return None
    beside = len(colours) > 4  # else a legend hides curves
    figure = Figure(figsize=(7.6 if beside else 5.2, 3.4), layout='constrained')
    axis = figure.subplots()
    for run in runs:
        axis.plot(*run.curves.get(name, ([], [])), color=colours[run.arm], marker='.', linewidth=1)
    for arm, colour in colours.items():
        axis.plot([], [], color=colour, label=arm)
    axis.set(title=name.replace('_', ' '), xlabel='iteration', **(dict(yscale='log') if log else {}))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, **(dict(loc='upper left', bbox_to_anchor=(1, 1)) if beside else {}))
    return figure
