"""Statistics of runs: a randomised block design of arms and seeds, and Holm's adjustment of p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
CHANCE_LEVEL = 0.01  # a run is at chance if guessing reaches its accuracy with a greater probability


@dataclass
class Effect:
    """The difference of an arm from a reference in one outcome.

    Attributes:
        arm: its name.
        outcome: the outcome's name.
        value: the arm's mean minus the reference's, over seeds.
        interval: the 95 % confidence interval of ``value``.
        p: the p-value of no difference, adjusted for the number of arms.
        pairs: the arm's outcome minus the reference's, for each seed that both have.
    """

    arm: str
    outcome: str
    value: float
    interval: tuple[float, float]
    p: float
    pairs: list[float]

    def __str__(self) -> str:
        low, high = self.interval
        return f'{100 * self.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]'


def compute_chance_limit(tests: int, chance: float) -> float:
    """Return the highest accuracy on ``tests`` examples that is at chance: a binomial test against guessing."""
    return float(stats.binom.isf(CHANCE_LEVEL, tests, chance)) / tests


def adjust_p_values(p: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's method."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.sort(p) * (len(p) - np.arange(len(p))))
    return [float(min(1, adjusted[list(order).index(i)])) for i in range(len(p))]


@dataclass(frozen=True)
class Contrast:
    """An arm's mean minus a reference's, estimated in a block design.

    Attributes:
        value: the difference.
        error: its standard error.
        freedom: degrees of freedom of the residuals.
        residual: their standard deviation.
    """

    value: float
    error: float
    freedom: int
    residual: float

    def compute_margin(self, level: float = LEVEL) -> float:
        """Return the half-width of the confidence interval of 1 - level."""
        return float(stats.t.isf(level / 2, self.freedom)) * self.error

    def compute_detectable(self, power: float) -> float:
        """Return the smallest true difference that the test of ``p`` would detect with this power (approximately)."""
        return float(stats.t.isf(LEVEL / 2, self.freedom) + stats.t.ppf(power, self.freedom)) * self.error

    @property
    def p(self) -> float:
        """The p-value of no difference."""
        return (
            2 * float(stats.t.sf(abs(self.value) / self.error, self.freedom)) if self.error else float(not self.value)
        )

    def test_equivalence(self, bound: float) -> float:
        """Return the p-value of a difference of at least ``bound``, up or down: two one-sided t-tests (TOST)."""
        if not self.error:
            return float(abs(self.value) >= bound)
        return float(stats.t.sf((bound - abs(self.value)) / self.error, self.freedom))


def fit_block_design(values: dict[tuple[str, int], float], arms: Sequence[str], reference: str) -> dict[str, Contrast]:
    """Fit arms and seeds by least squares (a randomised block design, the seeds being the blocks).

    Args:
        values: by arm and seed.
        arms: to fit together, with one error for all.
        reference: the arm from which differences are taken.

    Returns:
        The contrasts by arm. Empty if there are too few values to estimate the error.
    """
    runs = [run for run in values if run[0] in (reference, *arms)]
    seeds = sorted({seed for _, seed in runs})
    freedom = len(runs) - len(arms) - len(seeds)
    if freedom < 1 or not arms:
        return {}
    columns = [*((0, arm) for arm in arms), *((1, seed) for seed in seeds)]
    design = np.array([[run[of] == name for of, name in columns] for run in runs], float)
    ys = np.array([values[run] for run in runs])
    means = np.linalg.lstsq(design, ys, rcond=None)[0]
    noise = np.square(ys - design @ means).sum() / freedom
    errors = np.sqrt(noise * np.diag(np.linalg.inv(design.T @ design)))
    return {
        arm: Contrast(value, error, freedom, float(np.sqrt(noise)))
        for arm, value, error in zip(arms, means.tolist(), errors.tolist())
    }


def estimate_effects(
    outcomes: dict[str, dict[tuple[str, int], float]], groups: dict[str, str], reference: str
) -> list[Effect]:
    """Estimate the effect of every arm on every outcome.

    Two arms alone give the paired t-test. With more arms all residuals estimate the error, because three pairs are few.
    Seeds without the reference are left out.

    Args:
        outcomes: by outcome, arm and seed.
        groups: the group of each arm; arms of one group share the estimate of their error.
        reference: the arm from which differences are taken.

    Returns:
        The effects by outcome and arm, with p-values adjusted within each outcome; without those that have too few runs
        to estimate the error.
    """
    effects: list[Effect] = []
    for outcome, by_run in outcomes.items():
        seeds = sorted(seed for arm, seed in by_run if arm == reference)
        values = {(arm, seed): value for (arm, seed), value in by_run.items() if seed in seeds}
        arms = [arm for arm in dict.fromkeys(arm for arm, _ in values) if arm != reference]
        of_outcome: list[Effect] = []
        for group in dict.fromkeys(groups[arm] for arm in arms):
            together = [arm for arm in arms if groups[arm] == group]
            for arm, contrast in fit_block_design(values, together, reference).items():
                pairs = [values[arm, seed] - values[reference, seed] for seed in seeds if (arm, seed) in values]
                value, margin = contrast.value, contrast.compute_margin()
                of_outcome.append(Effect(arm, outcome, value, (value - margin, value + margin), contrast.p, pairs))
        for effect, p in zip(of_outcome, adjust_p_values([effect.p for effect in of_outcome])):
            effect.p = p
        effects += of_outcome
    return effects
