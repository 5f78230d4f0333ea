"""Reported differences between detectors: random ones are within the noise, and large ones are not."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spec_mmdet.evaluation.comparison import Run, compare_arms, compare_two_arms, group_runs

DRAWS = 400


def run(arm: str, seed: int, ap: float, rng: np.random.Generator, noise: float = 0.01) -> Run:
    return Run(arm, seed, Path(arm), dict(bbox=ap), dict(bbox=ap + noise * rng.standard_normal(DRAWS)))


def test_verdicts():
    rng = np.random.default_rng(0)
    plain = [run('plain', seed, 0.40 + 0.002 * seed, rng) for seed in range(3)]
    better = [run('better', seed, 0.50 + 0.002 * seed + 0.001 * (seed == 1), rng) for seed in range(3)]
    same = [run('same', seed, 0.40 + 0.002 * (2 - seed), rng) for seed in range(3)]
    once = [run('once', 0, 0.50, rng)]
    chance = [run('chance', seed, ap, rng, 1e-4) for seed, ap in enumerate((0.30, 0.42, 0.60))]
    found = {entry.arm: entry for entry in compare_arms([*plain, *better, *same, *once, *chance])}
    assert found['better'].verdict == 'beyond the noise' and found['better'].paired
    assert found['better'].value == pytest.approx(0.1003, abs=1e-4)
    assert found['same'].verdict == 'within the noise of the images and seeds'
    assert found['chance'].verdict == 'within the noise of the seeds'
    assert 'with one run' in found['once'].verdict and found['once'].seeds is None and not found['once'].paired
    assert list(group_runs([*better, *plain])) == ['better', 'plain']


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.booleans())
def test_intervals_follow_the_textbook_formulas(seed, paired):
    """Student's t by its formula, and quantiles of the draws."""
    rng = np.random.default_rng(seed)
    ours = [run('a', i, *rng.random(1), rng) for i in range(4)]
    theirs = [run('b', i + (not paired), *rng.random(1), rng) for i in range(4)]
    entry = compare_two_arms(ours, theirs, 'bbox')
    a, b = (np.array([r.ap['bbox'] for r in runs]) for runs in (ours, theirs))
    if paired:
        error, freedom = (a - b).std(ddof=1) / 2, 3
    else:
        va, vb = a.var(ddof=1) / 4, b.var(ddof=1) / 4
        error, freedom = np.sqrt(va + vb), (va + vb) ** 2 / (va**2 / 3 + vb**2 / 3)
    reach = stats.t.ppf(0.975, freedom) * error
    assert entry.seeds == pytest.approx((a.mean() - b.mean() - reach, a.mean() - b.mean() + reach))
    drawn = sum(r.drawn['bbox'] for r in ours) / 4 - sum(r.drawn['bbox'] for r in theirs) / 4
    below, above = (drawn < entry.images[0]).mean(), (drawn > entry.images[1]).mean()
    assert below == pytest.approx(0.025, abs=0.005) and above == pytest.approx(0.025, abs=0.005)


def test_runs_without_any_spread():
    rng = np.random.default_rng(0)
    one, other = ([run(arm, seed, ap, rng, 0) for seed in range(2)] for arm, ap in (('a', 0.5), ('b', 0.4)))
    entry = compare_two_arms(one, other, 'bbox')
    assert entry.seeds == pytest.approx((0.1, 0.1)) and entry.verdict == 'beyond the noise'
