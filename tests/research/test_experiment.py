"""Test the experiment: its arms' initial weights and configs, its commands, and the report of its logs."""

import json
import multiprocessing
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_tool
from hypothesis import assume, given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from scipy import stats

from research.experiment import __main__ as command
from research.experiment.arms import (
    DETECTION,
    LAMBDA_10,
    MODERATE,
    PRETRAINING,
    SCRATCH,
    SCREENING_SEED,
    Arm,
    Run,
    Size,
    choose_final_arms,
    list_screened_arms,
    read_logs,
    write_config,
    write_start,
)
from research.experiment.chain import WORK, Chain
from research.experiment.report import KAPPAS, compare_arms, rank, write_report
from research.statistics import adjust_p_values
from spec_mmdet import InputError
from spec_mmdet.conditioning import compute_condition_number, compute_svd_correction
from spec_mmdet.models.xcit import SpecXCiT

ARCH = dict(dim=16, depth=4, num_heads=2)
BACKBONE = dict(arch=ARCH, patch_size=8)
FULL = dict(type='identity', lam=10.0, per_head=False)
PLAIN = Arm('plain')
FASTER = Arm('full, 10, faster rows', FULL, rate=125, group=LAMBDA_10)


def logs_of(ap: dict[str, list[float]], stage: str, seeds=(1, 2, 3)) -> list[dict]:
    """Return logs of arms, given the box AP of each seed."""
    curve = {name: [[1, 2], [10.0, 20.0]] for name in KAPPAS}
    return [
        dict(arm=arm, group=LAMBDA_10 if arm.startswith('full, 10') else MODERATE, seed=seed, stage=stage,
             conditioning=None, ap=dict(box=value, mask=value / 2), seconds=60, commit='c', device='d',
             curves=dict(pretraining={**curve, 'accuracy/top1': [[1], [50 * value]]},
                         detection={**curve, 'box AP': [[1], [value]]}))
        for arm, values in ap.items() for seed, value in zip(seeds, values)
    ]  # fmt: skip


def test_all_arms_start_from_the_same_weights(tmp_path):
    arms = dict(
        plain=PLAIN,
        full=Arm('full', FULL),
        head=Arm('head', dict(FULL, per_head=True)),
        svd=Arm('svd', dict(type='svd')),
        decayed=Arm('decayed', start='W0 + C', initial=FULL),
        conditioned=Arm('conditioned', start='conditioned'),
    )
    starts = {}
    with ThreadPoolExecutor(len(arms)) as pool:  # as trainings begin
        for name, arm in arms.items():
            pool.submit(write_start, tmp_path / f'{name}.pth', BACKBONE, arm, seed=3)
    torch.manual_seed(3)
    alone = SpecXCiT(**BACKBONE).state_dict()
    for name in arms:
        starts[name] = torch.load(tmp_path / f'{name}.pth', weights_only=True)['state_dict']
    W0 = starts['plain']
    assert all(torch.equal(W0[key], value) for key, value in alone.items())
    for name, weights in starts.items():
        for key, value in W0.items():
            if name in ('decayed', 'conditioned') and key.endswith('attn.qkv.weight'):
                assert not torch.equal(weights[key], value)
            else:
                assert torch.equal(weights[key], value), (name, key)
    for i in range(ARCH['depth']):
        W = W0[f'blocks.{i}.attn.qkv.weight']
        assert starts['full'][f'blocks.{i}.attn.correction.lam'] == 10
        assert starts['head'][f'blocks.{i}.attn.correction.lam'].tolist() == [10, 10]
        C = compute_svd_correction(W.unflatten(0, (3, -1))).flatten(0, 1)
        torch.testing.assert_close(starts['svd'][f'blocks.{i}.attn.correction.C'], C)
        decayed = starts['decayed'][f'blocks.{i}.attn.qkv.weight']
        torch.testing.assert_close(decayed - W, 10 * torch.eye(16).repeat(3, 1), atol=1e-5, rtol=0)
        kappa = compute_condition_number(starts['conditioned'][f'blocks.{i}.attn.qkv.weight'].unflatten(0, (3, 2, -1)))
        torch.testing.assert_close(kappa, torch.ones(3, 2, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize('base', [PRETRAINING, DETECTION])
def test_configs_differ_only_in_conditioning_and_learning_rate(base, tmp_path):
    cfgs = {}
    for arm in (PLAIN, FASTER):
        path = tmp_path / f'{arm.rate}.py'
        write_config(path, base, arm, 7, Path('start.pth'), ARCH)
        cfgs[arm.rate] = Config.fromfile(path)
    plain, faster = (cfgs[arm.rate].to_dict() for arm in (PLAIN, FASTER))
    assert faster['randomness']['seed'] == 7
    keys = faster['optim_wrapper']['paramwise_cfg']['custom_keys']
    faster['optim_wrapper']['paramwise_cfg']['custom_keys'] = {k: v for k, v in keys.items() if 'qkv' not in k}
    assert faster['model']['backbone'].pop('conditioning') == FULL
    assert not plain['model']['backbone'].pop('conditioning', None)
    assert plain == faster

    rates = {}
    for arm in (PLAIN, FASTER):
        cfg = cfgs[arm.rate]
        cfg.model.backbone.init_cfg = None
        cfg.optim_wrapper.update(type='OptimWrapper')
        cfg.optim_wrapper.pop('loss_scale', None)
        model = MODELS.build(cfg.model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
        rates[arm.rate] = {
            names[id(p)]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']
        }
    for name, (rate, decay) in rates[1].items():
        raised = name.startswith('backbone.blocks.') and name.endswith('attn.qkv.weight')
        assert rates[125][name] == (pytest.approx(rate * (125 if raised else 1)), decay), name


def test_final_arms_follow_the_screening():
    screened = list_screened_arms(BACKBONE)
    assert len(screened) == 11
    sigma = max(torch.linalg.matrix_norm(W, 2) for W in seeded_projections())
    assert screened[3].conditioning['lam'] == pytest.approx(2 * sigma.item(), rel=1e-2)
    ap = {arm.name: [0.1] for arm in screened} | {'full, 2 sigma': [0.3], 'per head, 10': [0.2]}
    logs = logs_of(ap, 'screening', seeds=[0])
    chosen = choose_final_arms(BACKBONE, logs)
    names = [arm.name for arm in chosen]
    assert names[:4] == ['plain', 'full, 2 sigma', 'full, 10', 'per head, 10'] and len(names) == 8
    assert names[-1] == 'full, 10, faster rows'
    assert chosen[-1].rate == 125  # 10 / (0.02 sqrt(16))
    of_ten = {'full, 10', 'per head, 10', 'W0 + 10 I, decayed to 0', 'full, 10, faster rows'}
    assert {arm.name for arm in [*screened, *chosen] if arm.group == LAMBDA_10} == of_ten
    with pytest.raises(InputError, match='screening .*full, 10'):
        choose_final_arms(BACKBONE, [log for log in logs if log['arm'] != 'full, 10'])


def seeded_projections() -> list[torch.Tensor]:
    torch.manual_seed(SCREENING_SEED)
    model = SpecXCiT(**BACKBONE)
    return [W for block in model.blocks for W in block.attn.qkv.weight.unflatten(0, (3, -1))]


def test_holm_is_the_step_down_method():
    p = [0.04, 0.001, 0.03, 0.6]
    expected = dict.fromkeys(range(4), 0.0)
    running = 0.0
    for place, i in enumerate(sorted(range(4), key=p.__getitem__)):
        running = max(running, min(1, (4 - place) * p[i]))
        expected[i] = running
    assert adjust_p_values(p) == pytest.approx(list(expected.values()))


def test_two_arms_are_compared_by_the_paired_t_test():
    plain, other = [0.30, 0.33, 0.28], [0.31, 0.35, 0.27]
    box, mask, top1 = compare_arms(logs_of(dict(other=other, plain=plain), 'pretrained'))
    test = stats.ttest_rel(other, plain)
    assert box.p == pytest.approx(test.pvalue) == pytest.approx(mask.p)
    assert box.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    for half in (mask, top1):
        assert half.interval == pytest.approx(tuple(end / 2 for end in box.interval))
    assert box.pairs == pytest.approx([0.01, 0.02, -0.01])
    assert compare_arms(logs_of(dict(other=other, plain=plain[:1]), 'pretrained')) == []


@given(st.integers(2, 5), st.integers(2, 5), st.randoms(use_true_random=False))
def test_more_arms_share_the_error_of_a_block_design(arms, seeds, random):
    ap = np.array([[random.uniform(0.1, 0.5) for _ in range(seeds)] for _ in range(arms + 1)])
    names = ['plain', *map(str, range(arms))]
    logs = logs_of({name: row.tolist() for name, row in zip(names, ap)}, 'pretrained', range(seeds))
    logs += logs_of({'1': [0.4]}, 'pretrained', [99])  # plain lacks this seed
    rest = ap - ap.mean(0) - ap.mean(1, keepdims=True) + ap.mean()
    freedom = arms * (seeds - 1)
    error = np.sqrt(2 * (rest**2).sum() / freedom / seeds)
    assume(error > 1e-6)
    found = [effect for effect in compare_arms(logs) if effect.outcome == 'box AP']
    values = ap[1:].mean(1) - ap[0].mean()
    assert [effect.arm for effect in found] == names[1:]
    assert [effect.value for effect in found] == pytest.approx(values)
    margin = stats.t.ppf(0.975, freedom) * error
    assert [effect.interval[1] - effect.value for effect in found] == pytest.approx([margin] * arms)
    p = 2 * stats.t.cdf(-abs(values) / error, freedom)
    assert [effect.p for effect in found] == pytest.approx(adjust_p_values(p))


def test_arms_of_lambda_10_have_an_error_of_their_own():
    ap = {'plain': [0.30, 0.33, 0.28], 'svd': [0.31, 0.33, 0.29], 'full, 10': [0.1, 0.3, 0.2]}
    together = compare_arms(logs_of(ap, 'pretrained'))
    for arm in ('svd', 'full, 10'):
        alone = compare_arms(logs_of({name: ap[name] for name in ('plain', arm)}, 'pretrained'))
        own = [effect for effect in together if effect.arm == arm]
        assert [effect.interval for effect in own] == [pytest.approx(effect.interval) for effect in alone]


def test_report_says_what_the_logs_support(tmp_path):
    folder = tmp_path / 'experiment' / 'cpu'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = np.array([0.30, 0.33, 0.28])
    better, noise = base + 0.05 + [0.001, -0.001, 0], base + [0.02, -0.03, 0.011]
    paper = base - [0.04, 0.05, 0.03]
    arms = {'plain': base, 'svd': better, 'chance': noise, 'full, 10': paper, 'full, 10, faster rows': paper + 0.02}
    logs = logs_of(arms, 'pretrained')
    logs += logs_of(dict(plain=base - 0.2), 'scratch')
    for log in logs:
        for name in KAPPAS:  # independent of the AP
            for stage in log['curves'].values():
                stage[name] = [[1, 2], rng.uniform(1, 100, 2).tolist()]
    for i, log in enumerate(logs):
        (folder / f'{i}.json').write_text(json.dumps(log))
    text = write_report(tmp_path / 'experiment', tmp_path / 'experiment.md').read_text()
    assert '15 fine-tuned, 3 from scratch' in text
    assert re.search(r'\* full, 10, faster rows \(.*\): box AP \+2\.0 \[', text)
    assert '| cpu: box AP -4.0 [' in text
    assert re.search(r'\* box AP: better: svd \(\+5\.0 \[.*Worse: full, 10 \(-4\.0 \[', text)
    # A tenth of 6000 crops of 8 classes: guessing gives 12.5 %, and up to 15.7 % with a probability of 99 %.
    assert '15.7 %' in text and '  * plain: 2 of 3 runs' in text and '  * full, 10: 3 of 3 runs' in text
    assert '  * svd: ' not in text
    assert '+5.1, +4.9, +5.0)' in text and '+2.0, -3.0, +1.1)' in text
    assert '* plain: box AP 20.0 ± 0.0' in text
    assert '| all, 5 arms |' in text and '| without the arms' not in text
    for picture in ('ap', 'differences', 'kappa'):
        assert f'(experiment/cpu/{picture}.png)' in text and (folder / f'{picture}.png').is_file()


def test_arms_not_runs_are_correlated():
    """Compare with Spearman's rho of the arms' means; more runs of the same arms do not change it."""
    ap = {'plain': [0.3, 0.5], 'a': [0.45, 0.25], 'b': [0.2, 0.7], 'c': [0.7, 0.06], 'd': [0.5, 0.6]}
    logs = logs_of(ap, 'pretrained')
    kappas = {'plain': [5, 5], 'a': [100, 1], 'b': [2, 2], 'c': [90, 0.1], 'd': [1, 1]}
    for i, log in enumerate(logs):
        for stage in log['curves'].values():
            stage |= {name: [[1], [kappas[log['arm']][i % 2]]] for name in KAPPAS}
    rho = stats.spearmanr([5, 10, 2, 3, 1], [0.4, 0.35, 0.45, 0.38, 0.55]).statistic
    for some in (logs, [*logs, *logs]):
        rows, summary = rank(some)
        assert all(cell.startswith(f'{rho:+.2f} ') for row in rows for cell in row[1:])
        assert '0 of 12 ' in summary and '5 arms' in summary


def test_a_run_is_a_chain_of_commands(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def step(self, work, command, *argv):  # writes the files that the command would write
        calls.append((command, *argv))
        if command == 'convert':
            return
        cfg = Config.fromfile(argv[0])
        assert cfg.model.backbone.conditioning == FULL and cfg.randomness.seed == 5
        here = argv[argv.index('--work-dir') + 1]
        (here / 'run' / 'vis_data').mkdir(parents=True)
        (here / 'last_checkpoint').write_text('epoch_5.pth')
        metrics = {'accuracy/top1': 12.5} if command == 'pretrain' else {'coco/bbox_mAP': 0.25, 'coco/segm_mAP': 0.125}
        records = [dict(loss=2.0, iter=4, step=4), {'step': 5, 'conditioning/kappa_Q': 3.0}, dict(metrics, step=1)]
        (here / 'run/vis_data/scalars.json').write_text('\n'.join(map(json.dumps, records)))

    monkeypatch.setattr(Chain, 'run_command', step)
    chain = Chain(Size(16, 8, 128, 64, 32, ARCH), Path('data'), 1)
    work = WORK / 'full-10-faster-rows_seed5_pretrained'
    log = chain.train(Run(FASTER, 5))
    assert [call[0] for call in calls] == ['pretrain', 'convert', 'train']
    assert calls[1][1:] == (work / 'pretraining/epoch_5.pth', work / 'backbone.pth')
    starts = [Config.fromfile(calls[i][1]).model.backbone.init_cfg.checkpoint for i in (0, 2)]
    assert starts == [str((work / name).absolute()) for name in ('start.pth', 'backbone.pth')]
    assert (log['arm'], log['seed'], log['stage']) == (FASTER.name, 5, 'pretrained')
    assert log['ap'] == dict(box=0.25, mask=0.125)
    assert log['curves']['pretraining']['accuracy/top1'] == [[4], [12.5]]
    assert log['curves']['detection']['kappa_Q'] == [[5], [3.0]]

    calls.clear()
    chain.train(Run(FASTER, 5, SCRATCH))
    assert [call[0] for call in calls] == ['train']
    assert Path(Config.fromfile(calls[0][1]).model.backbone.init_cfg.checkpoint).name == 'start.pth'


def test_a_step_that_fails_says_where_to_look(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    chain = Chain(Size(16, 8, 128, 64, 32), Path('data'), 1)
    chain.context = multiprocessing.get_context('fork')  # the parent has imported everything
    with pytest.raises(InputError, match='convert .*run.log'):
        chain.run_command(tmp_path / 'run', 'convert', 'nowhere.pth', 'out.pth')
    assert (tmp_path / 'run.log').is_file()


def test_logs_without_a_group_get_that_of_their_arm(tmp_path):
    groups = {'full, 10': LAMBDA_10, 'W0 + 10 I, decayed to 0': LAMBDA_10, 'full, 5 sigma': MODERATE, 'svd': MODERATE}
    for i, arm in enumerate(groups):
        (tmp_path / f'{i}.json').write_text(json.dumps(dict(arm=arm)))
    (tmp_path / '9.json').write_text(json.dumps(dict(arm='lambda of 10', group=MODERATE)))
    assert {log['arm']: log['group'] for log in read_logs(tmp_path)} == {**groups, 'lambda of 10': MODERATE}


def test_finished_runs_are_not_repeated(monkeypatch, tmp_path, capsys):
    """The command finds the repository's 50 logs, trains nothing and writes the committed report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, 'train', lambda *_: pytest.fail('must not start'))
    logs = shutil.copytree(command.LOGS, tmp_path / 'logs')
    monkeypatch.setattr(command, 'LOGS', logs)
    monkeypatch.setattr(command, 'REPORT', tmp_path / 'README.md')
    run_tool(monkeypatch, command.__name__)
    printed = capsys.readouterr().out
    assert '11 runs, 11 of them finished' in printed and '39 runs, 39 of them finished' in printed
    assert (tmp_path / 'README.md').read_text() == (ROOT / 'research' / 'experiment' / 'README.md').read_text()
    assert not (tmp_path / 'work_dirs').exists()
