"""Test the follow-up: what its arms make of W, its decisions, and its statistics."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats

from research.followup.arms import (
    CONDITIONED,
    DOSED,
    LARGER,
    PLAIN,
    RANDOM,
    RESCALED,
    WIDE,
    build_initial_model,
    select_projections,
)
from research.followup.plan import BOUND, RATES, SYSTEMS, Protocol, plan_bert, plan_scale, plan_tuning
from research.followup.report import write_report
from research.followup.xcit import XCiT
from research.statistics import fit_block_design
from research.systems.bert import Bert
from research.systems.runs import Log, train, write_log
from spec_mmdet.conditioning import condition
from spec_mmdet.models.classifier import SpecXCiTClassifier

TINY = dict(xcit=XCiT(layers=4, width=32, pictures=16, tests=16, steps=2), bert=Bert(steps=2, tests=16))


def get_heads(system, arm):
    """Return W of each projection's heads at the start: shape (projections, heads, d, k)."""
    model, targets, _ = build_initial_model(system, arm, 1)
    return torch.cat([p.W.unflatten(1, (p.heads, -1)) for p in select_projections(model)]).double(), targets


@pytest.mark.parametrize('name', TINY)
def test_arms_separate_size_from_condition(name):
    system = TINY[name]
    W, _ = get_heads(system, PLAIN)
    sizes, kappas = {}, {}
    for arm in (PLAIN, CONDITIONED, LARGER, RESCALED, RANDOM, DOSED, WIDE):
        changed, targets = get_heads(system, arm)
        assert bool(targets) == (arm in (CONDITIONED, RESCALED, RANDOM, DOSED))
        sizes[arm] = changed.flatten(1).norm(dim=1)
        kappas[arm] = torch.linalg.cond(changed).median()
    sigma = torch.linalg.matrix_norm(W, 2)[..., None, None]
    expected = W + 2 * sigma * torch.eye(*W.shape[-2:]).double()
    torch.testing.assert_close(get_heads(system, CONDITIONED)[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sizes[LARGER], sizes[CONDITIONED], rtol=1e-5, atol=0)
    torch.testing.assert_close(sizes[RESCALED], sizes[PLAIN], rtol=1e-5, atol=0)
    torch.testing.assert_close(sizes[RANDOM], sizes[CONDITIONED], rtol=0.05, atol=0)
    torch.testing.assert_close(
        sizes[WIDE] / sizes[PLAIN], torch.full_like(sizes[PLAIN], 50 / system.width**0.5), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(kappas[LARGER], kappas[PLAIN], rtol=1e-3, atol=0)
    torch.testing.assert_close(kappas[RESCALED], kappas[CONDITIONED], rtol=1e-3, atol=0)
    assert kappas[CONDITIONED] < 2 < kappas[PLAIN] and kappas[RANDOM] < 2 and kappas[DOSED] < 1.2


def test_init_std_starts_from_the_weights_of_the_wide_arm():
    system = XCiT()
    expected, _, _ = build_initial_model(system, WIDE, 1)
    torch.manual_seed(1)
    arch = dict(dim=system.width, depth=system.layers, num_heads=system.heads)
    model = SpecXCiTClassifier(expected.num_classes, arch, patch_size=system.patch, init_std=system.width**-0.5)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_conditioned_arm_trains_as_condition_does():
    """The arm and the package's own condition() with keep_fixed end in the same loss; without decay's target, not."""
    system = dataclasses.replace(Bert(), steps=20, tests=50, weight_decay=3.0)
    ours = train(system, 'ours', 1, lambda system, _, seed: build_initial_model(system, CONDITIONED, seed))

    def build(system, _, seed):
        torch.manual_seed(seed)
        model = system.build_model()
        return model, condition(model, sigmas=2.0, per_head=True).corrections, None

    package = train(system, 'package', 1, build)
    assert ours.loss == pytest.approx(package.loss, rel=1e-5)
    assert ours.kappa['head'][1] == pytest.approx(package.kappa['head'][1], rel=1e-3)
    plain = train(system, 'plain', 1)
    assert plain.kappa['head'][1] > 1.3 * ours.kappa['head'][1]


def test_block_design_agrees_with_paired_t_tests():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.01, (2, 12)) + rng.normal(0, 1, 12)
    values = {('a', seed): x for seed, x in enumerate(a)} | {('b', seed): x for seed, x in enumerate(b)}
    contrast = fit_block_design(values, ['a'], 'b')['a']
    assert contrast.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert contrast.value + contrast.compute_margin() == pytest.approx(high)
    for bound in (0.02, 0.001):
        expected = max(stats.ttest_rel(a, b + bound, alternative='less').pvalue,
                       stats.ttest_rel(a, b - bound, alternative='greater').pvalue)  # fmt: skip
        assert contrast.test_equivalence(bound) == pytest.approx(expected)
    assert contrast.residual == pytest.approx(np.std(a - b, ddof=1) / 2**0.5)


def forge(logs, runs, get_loss):
    for run in runs:
        write_log(logs / run.stage, Log(
            arm=run.arm.name, seed=run.seed, settings=run.system.get_settings(), lam=None, keys=1.0, accuracy=0.5,
            loss=get_loss(run), curve=[], kappa=dict(whole=(1.0, 1.0), head=(1.0, 1.0)), seconds=1.0, torch='',
        ))  # fmt: skip


@pytest.mark.parametrize('wide_is_better', [False, True])
@pytest.mark.parametrize('noise', [0.5 * BOUND, 2 * BOUND])
def test_decisions_and_report(tmp_path, wide_is_better, noise):
    rng, protocol = np.random.default_rng(0), Protocol(tmp_path)
    stages = protocol.plan()
    for name, system in SYSTEMS.items():
        assert protocol.list_arms(name) is None
        runs = next(stages)
        assert runs == plan_scale(name, system) and len(runs) == 9
        forge(
            tmp_path, runs, lambda run: 0.5 if run.arm is WIDE and wide_is_better else 0.7 if run.arm is WIDE else 0.6
        )
    tuning = next(stages)
    assert tuning == plan_tuning(protocol.list_arms('bert')) and len(tuning) == 30
    assert all(run.arm.wide == wide_is_better for run in tuning)
    best = dict(zip(dict.fromkeys(run.arm.name for run in tuning), (*RATES, *RATES)))
    forge(tmp_path, tuning, lambda run: 1.0 + (run.system.lr != best[run.arm.name]))
    runs = next(stages)
    assert runs == plan_bert(protocol.list_arms('bert'), protocol.choose_rates()) and len(runs) == 75
    assert {run.arm.name: run.system.lr for run in runs} == best

    def draw(run):
        return 1.0 - 0.1 * run.arm.name.endswith('2 sigma') + run.seed + rng.normal(0, noise)

    forge(tmp_path, runs, draw)
    first = next(stages)
    assert len(first) == 16
    forge(tmp_path, first, draw)
    every = next(stages)
    assert every[:16] == first and len(every) == (48 if noise < BOUND else 16 + 3 * 12)
    forge(tmp_path, every[16:], draw)
    added = next(stages)
    assert {run.arm for run in added} == {PLAIN if wide_is_better else WIDE} and len(added) == 12
    forge(tmp_path, added, draw)
    assert next(stages, None) is None
    text = write_report(protocol, tmp_path / 'report.md').read_text()
    assert text.count('is lower (p') == 2 and f'{len(every)} of {len(every)} runs' in text


def test_a_training_leaves_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = plan_scale('xcit', TINY['xcit'])[1]
    log = run.train('cpu')
    assert log.arm == CONDITIONED.name and np.isfinite(log.loss) and log.settings['pictures'] == 16
    write_log(tmp_path / run.stage, log)
    assert run.read(tmp_path).loss == log.loss
