"""The report of the experiment, from the logs of its runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib.figure import Figure
from scipy import stats

from ..files import write, write_atomically
from .comparison import Run, arms_of, draw_curve, spread

KINDS = ('box', 'mask')
KAPPAS = ('kappa_Q', 'kappa_K', 'kappa_V', 'kappa_J')
FIRST = 'plain'  # the arm that the others are measured from
PAPER = 'full, 10'
TUNED = 'Fine-tuned from pretraining'
CONTROLS = {
    'W0 + 10 I, decayed to 0': 'below 0 if a C that stays does more than one that is an initialisation only',
    'full, 10, faster rows': 'above 0 if it learns slowly because long rows turn slowly',
}
# When a condition number is taken: the curves that it is in, and which of their values.
MOMENTS = {'at the start': ('pretraining', 0), 'pretrained': ('pretraining', -1), 'fine-tuned': ('detection', -1)}
# What the paper reports with lambda = 10, for its detector and its largest classifier.
GAINS = {'box AP': 0.007, 'mask AP': 0.004, 'top-1': 0.009}
LEVEL = 0.05


@dataclass
class Effect:
    """Of an arm, against another.

    Attributes:
        arm: its name.
        outcome: what is compared: 'box AP', 'mask AP' or 'top-1', all from 0 to 1.
        value: the arm's mean minus the other's, over seeds.
        interval: that of 95 % for ``value``.
        p: of no difference, adjusted for the number of arms.
        pairs: the arm's outcome minus the other's, of each seed that both have.
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


def write_report(folder: Path, path: Path) -> Path:
    """Write the report, and its pictures beside the logs.

    Args:
        folder: of a folder of logs for each size of the experiment.
        path: the Markdown file.

    Returns:
        ``path``.
    """
    sections, said = [], dict(detection=[], classification=[], kappa=[])
    for own in sorted(own for own in folder.glob('*') if own.is_dir()):
        logs = [json.loads(file.read_text()) for file in sorted(own.glob('*.json'))]
        logs.sort(key=lambda log: (log['arm'] != FIRST, of_ten(log['arm'])))  # and by seed, as the files are
        if logs:
            sections += section(own, logs, path.parent, said)
    template = Path(__file__).with_name('experiment.md').read_text('utf-8')
    text = '\n'.join(sections).strip() or 'No run is there yet.'
    write(path, Template(template, keep_trailing_newline=True).render(sections=text, said=said))
    return path


def section(folder: Path, logs: Sequence[dict], root: Path, said: dict[str, list[str]]) -> list[str]:
    """The report of one size; ``said`` gets what it comes to."""
    hours = sum(log['seconds'] for log in logs) / 3600
    screening = sorted((log for log in logs if log['stage'] == 'screening'), key=by_lambda)
    tuned, scratch = ([log for log in logs if log['stage'] == stage] for stage in ('pretrained', 'scratch'))
    stages = {TUNED: tuned, 'From scratch': scratch}
    found = {title: measured(own) for title, own in stages.items() if own}
    commits = sorted({str(log['commit'])[:12] for log in logs})
    lines = [
        f'## Size {folder.name}\n',
        f'{len(logs)} runs: {len(screening)} of the screening, {len(tuned)} fine-tuned, {len(scratch)} from scratch; '
        f'{hours:.1f} hours of trainings, several at a time; {", ".join(sorted({log["device"] for log in logs}))}; '
        f'code of {", ".join(commits)}.\n',
        '### What it supports\n',
        *sentences(found),
        '',
    ]
    if screening:
        lines += ['### Screening of lambda, one seed\n', *table(
            ['arm', 'lambda', 'top-1', 'box AP', 'mask AP', *KAPPAS],
            [[log['arm'], (log['conditioning'] or {}).get('lam', ''), last(log, 'pretraining', 'accuracy/top1', '.1f'),
              *(f'{100 * log["ap"][kind]:.1f}' for kind in KINDS),
              *(last(log, 'detection', name, '.3g') for name in KAPPAS)]
             for log in screening],
        ), '', 'kappa at the end of fine-tuning, medians over the layers.\n']  # fmt: skip
    for title, effects in found.items():
        lines += [f'### {title}\n', *table_of_arms(stages[title], effects), '', *controls(stages[title])]
    if tuned and scratch:
        lines += against_scratch(tuned, scratch)
    if tuned:
        runs = as_runs(tuned)
        name = folder / 'ap.png'
        save(draw_curve(runs, 'box AP'), name)
        save(draw_effects(found[TUNED]), folder / 'differences.png')
        lines += [
            f'![differences]({(folder / "differences.png").relative_to(root)})\n',
            f'![box AP]({name.relative_to(root)})\n',
        ]
        lines += conditioning(tuned)
    every = [*screening, *tuned]
    if len(every) > 4:
        lines += correlations(every, folder / 'kappa.png', root, said, folder.name)
    conclude(found, said, folder.name)
    return lines


def by_lambda(log: dict) -> tuple[bool, float]:
    """The order of the screening: plain, the full form, per head, each by lambda."""
    conditioning = log['conditioning'] or dict(per_head=False, lam=0)
    return conditioning['per_head'], conditioning['lam']


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of Markdown."""
    return ['| ' + ' | '.join(map(str, row)) + ' |' for row in (columns, ['---'] * len(columns), *rows)]


def by_arm(logs: Sequence[dict]) -> dict[str, list[dict]]:
    """Logs by their arms, in the logs' order."""
    arms: dict[str, list[dict]] = {}
    for log in logs:
        arms.setdefault(log['arm'], []).append(log)
    return arms


def kappa_at(log: dict, name: str, moment: str) -> float:
    """A condition number of a run that was pretrained, at one of :data:`MOMENTS`."""
    stage, index = MOMENTS[moment]
    return log['curves'][stage][name][1][index]


def last(log: dict, stage: str, name: str, form: str) -> str:
    """The last value of a curve."""
    values = log['curves'].get(stage, {}).get(name, [[], []])[1]
    return format(values[-1], form) if values else ''


def as_runs(logs: Sequence[dict]) -> list[Run]:
    """As comparisons take them, over seeds alone."""
    return [
        Run(log['arm'], log['seed'], Path(), log['ap'], drawn={},
            curves={name: (xs, ys) for name, (xs, ys) in log['curves']['detection'].items()})
        for log in logs
    ]  # fmt: skip


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several tests, by Holm's method."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(np.sort(p) * (len(p) - np.arange(len(p))))
    return [float(min(1, adjusted[list(order).index(i)])) for i in range(len(p))]


def outcomes(log: dict) -> dict[str, float]:
    """What a run came to, each from 0 to 1."""
    found = {f'{kind} AP': log['ap'][kind] for kind in KINDS}
    if 'pretraining' in log['curves']:
        found['top-1'] = log['curves']['pretraining']['accuracy/top1'][1][-1] / 100
    return found


def of_ten(arm: str) -> bool:
    """Whether lambda is 10 in an arm, or was when it began."""
    return '10' in re.findall(r'\d+', arm)


def measured(logs: Sequence[dict], reference: str = FIRST) -> list[Effect]:
    """Of every arm, by least squares over arms and seeds with one error for all (a randomised block design).

    Of two arms alone this is the paired t-test; of more, all their residuals tell what the noise is, which three pairs
    by themselves hardly do. The arms of lambda = 10, which seeds move more, have an error of their own. Seeds without
    the reference are left out.

    Args:
        logs: of one stage.
        reference: the arm that the others are measured from.

    Returns:
        The effects by outcome and arm; none where the runs are too few to tell the noise.
    """
    values = {(log['arm'], log['seed']): outcomes(log) for log in logs}
    seeds = sorted(seed for arm, seed in values if arm == reference)
    arms = [arm for arm in dict.fromkeys(arm for arm, seed in values if seed in seeds) if arm != reference]
    found: list[Effect] = []
    for outcome in outcomes(logs[0]) if logs else ():
        own = {(arm, seed): value[outcome] for (arm, seed), value in values.items() if seed in seeds}
        effects: list[Effect] = []
        for group in ([arm for arm in arms if not of_ten(arm)], [arm for arm in arms if of_ten(arm)]):
            for arm, (value, margin, p) in least_squares(own, group, reference).items():
                pairs = [own[arm, seed] - own[reference, seed] for seed in seeds if (arm, seed) in own]
                effects.append(Effect(arm, outcome, value, (value - margin, value + margin), p, pairs))
        for effect, p in zip(effects, holm([effect.p for effect in effects])):
            effect.p = p
        found += effects
    return found


def least_squares(
    values: dict[tuple[str, int], float], arms: Sequence[str], reference: str
) -> dict[str, tuple[float, float, float]]:
    """Differences of arms from a reference, with what is the seeds' own taken out.

    Args:
        values: by arm and seed.
        arms: which to fit, together.
        reference: the arm that they are measured from, on their seeds.

    Returns:
        Of each arm its difference, the margin of 95 % and p; nothing where the values are too few to tell the noise.
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
    quantile = float(stats.t.isf(LEVEL / 2, freedom))
    found = {}
    for arm, value, error in zip(arms, means.tolist(), errors.tolist()):
        p = 2 * float(stats.t.sf(abs(value) / error, freedom)) if error else float(not value)
        found[arm] = value, quantile * error, p
    return found


def table_of_arms(logs: Sequence[dict], found: Sequence[Effect]) -> list[str]:
    """A row for each arm."""
    names = list(outcomes(logs[0]))
    rows = []
    for arm, own in by_arm(logs).items():
        apart = {}
        for effect in (effect for effect in found if effect.arm == arm):
            pairs = ', '.join(f'{100 * pair:+.1f}' for pair in effect.pairs)
            apart[effect.outcome] = f'{effect}, p {effect.p:.2g}<br>({pairs})'
        rows.append([
            arm, ', '.join(str(log['seed']) for log in own),
            *(spread([outcomes(log)[name] for log in own]) for name in names),
            *(apart.get(name, '') for name in names),
        ])  # fmt: skip
    return table(['arm', 'seeds', *names, *(f'{name}, from plain' for name in names)], rows)


def controls(logs: Sequence[dict]) -> list[str]:
    """What the controls of lambda = 10 come to, from that arm."""
    effects = measured([log for log in logs if of_ten(log['arm'])], PAPER)
    told = {arm: ', '.join(f'{one.outcome} {one}' for one in effects if one.arm == arm) for arm in CONTROLS}
    lines = [f'* {arm} ({CONTROLS[arm]}): {text}' for arm, text in told.items() if text]
    return [f'From *{PAPER}*:\n', *lines, ''] if lines else []


def against_scratch(tuned: Sequence[dict], scratch: Sequence[dict]) -> list[str]:
    """What pretraining gains at equal detection budget."""
    lines = ['Pretraining gains, at the same budget of detection:\n']
    for arm, runs in arms_of(as_runs(scratch)).items():
        others = {run.seed: run for run in as_runs(tuned) if run.arm == arm}
        pairs = [(others[run.seed], run) for run in runs if run.seed in others]
        if pairs:
            gains = [
                f'{kind} AP {spread([ours.ap[kind] - theirs.ap[kind] for ours, theirs in pairs])}' for kind in KINDS
            ]
            lines.append(f'* {arm}: {", ".join(gains)} ({len(pairs)} seeds)')
    return [*lines, '']


def conditioning(logs: Sequence[dict]) -> list[str]:
    """Condition numbers along the way."""
    rows = []
    for arm, own in by_arm(logs).items():
        means = ([stats.gmean([kappa_at(log, name, moment) for log in own]) for moment in MOMENTS] for name in KAPPAS)
        rows.append([arm, *(' / '.join(f'{mean:.3g}' for mean in row) for row in means)])
    return [
        '### Condition numbers\n',
        f'{", ".join(MOMENTS).capitalize()}: medians over the layers, of W + C where there is a C, geometric means '
        "over the seeds; of each head's rows in the arms *per head*, else of whole projections, of which the "
        "conditioned initialisation, which is of each head's rows, knows nothing. J is the attention's Jacobian on an "
        'image.\n',
        *table(['arm', *KAPPAS], rows),
        '',
    ]


def correlations(logs: Sequence[dict], path: Path, root: Path, said: dict[str, list[str]], name: str) -> list[str]:
    """Whether a run's condition numbers tell its AP."""
    figure = Figure(figsize=(14, 4), layout='constrained')
    axes = figure.subplots(1, 4, sharey=True)
    for axis, kappa in zip(axes, KAPPAS):
        for i, (arm, own) in enumerate(by_arm(logs).items()):
            axis.plot([kappa_at(log, kappa, 'fine-tuned') for log in own], [100 * log['ap']['box'] for log in own],
                      'osv^'[i // 10 % 4], color=f'C{i % 10}', markersize=4, label=arm)  # fmt: skip
        axis.set(xscale='log', title=kappa)
        axis.grid(alpha=0.3)
    figure.supylabel('box AP')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    save(figure, path)
    lines = [
        '### Does a condition number tell the AP?\n',
        "Spearman's rank correlation of a run's condition numbers with its box AP, over all runs that were fine-tuned, "
        'the screening among them. Negative is as claimed: the better conditioned, the better.\n',
    ]
    for title, own in (
        ('all', logs),
        ('without the arms of lambda = 10', [log for log in logs if not of_ten(log['arm'])]),
    ):
        if len(own) > 4:
            rows, told = ranked(own)
            said['kappa'].append(f'{name}, {title}: {told}.')
            columns = [f'{title}, {len(own)} runs', *MOMENTS]
            lines += [*table(columns, rows), '', f'{told[0].upper()}{told[1:]}.\n']
    return [*lines, f'![box AP over condition numbers]({path.relative_to(root)})\n']


def ranked(logs: Sequence[dict]) -> tuple[list[list[str]], str]:
    """Rank correlations with box AP, a row for each condition number, and what they come to."""
    rows, tests = [], []
    for kappa in KAPPAS:
        row = [kappa]
        for moment in MOMENTS:
            values = [kappa_at(log, kappa, moment) for log in logs]
            test = stats.spearmanr(values, [log['ap']['box'] for log in logs])
            row.append(f'{test.statistic:+.2f} (p {test.pvalue:.2g})')
            tests.append(test)
        rows.append(row)
    threshold = LEVEL / len(tests)
    telling = [test.statistic for test in tests if test.pvalue < threshold]
    claimed = f', {sum(rho < 0 for rho in telling)} of them in the direction that is claimed' if telling else ''
    return rows, (
        f'{len(telling)} of {len(tests)} rank correlations of a condition number with box AP are beyond chance '
        f'(p < {threshold:.2g}){claimed}'
    )


def conclude(found: dict[str, list[Effect]], said: dict[str, list[str]], name: str) -> None:
    """What the tables say to the paper's rows."""
    own = [effect for effect in found.get(TUNED, []) if effect.arm == PAPER]
    for row, names in (('detection', [f'{kind} AP' for kind in KINDS]), ('classification', ['top-1'])):
        if effects := [f'{effect.outcome} {effect}' for effect in own if effect.outcome in names]:
            said[row].append(f'{name}: {", ".join(effects)}.')


def sentences(found: dict[str, list[Effect]]) -> list[str]:
    """What the tables support, and what they do not."""
    lines = []
    for title, effects in found.items():
        if not effects:
            lines.append(f'* {title}: no two arms have two seeds yet; nothing can be said.')
            continue
        lines.append(f'* {title}, beyond the noise of the seeds:')
        for name, gain in GAINS.items():
            own = [effect for effect in effects if effect.outcome == name]
            if not own:
                continue
            telling = [effect for effect in own if effect.p < LEVEL]
            signs = (
                [f'{effect.arm} ({effect}, p {effect.p:.2g})' for effect in telling if (effect.value > 0) == better]
                for better in (True, False)
            )
            better, worse = map('; '.join, signs)
            width = min((effect.interval[1] - effect.interval[0]) / 2 for effect in own)
            seen = f": a gain like the paper's {100 * gain:.1f} could not be seen" * (width > gain)
            lines += [
                f'  * {name}, better than plain: {better or "none"}.',
                f'    Worse: {worse or "none"}. The narrowest interval is ± {100 * width:.1f} points{seen}.',
            ]
    if not lines:
        lines.append('* Nothing yet: the runs with several seeds are owed.')
    return [
        *lines,
        '* It is a small model on generated images: what holds here need not hold for XCiT-S on COCO, nor the reverse.',
    ]


def draw_effects(found: Sequence[Effect]) -> Figure:
    """Every effect with its interval, and the pairs that it is from."""
    names = list(dict.fromkeys(effect.outcome for effect in found))
    arms = list(dict.fromkeys(effect.arm for effect in found))
    figure = Figure(figsize=(11, 1 + 0.3 * len(arms)), layout='constrained')
    for axis, name in zip(figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0], names):
        for effect in found:
            if effect.outcome == name:
                row = -arms.index(effect.arm)
                axis.plot([100 * end for end in effect.interval], [row, row], color='C0', linewidth=3)
                axis.plot([100 * pair for pair in effect.pairs], [row] * len(effect.pairs), '|', color='gray')
                axis.plot(100 * effect.value, row, 'ko', markersize=4)
        axis.axvline(0, color='gray', linewidth=1)
        axis.set_yticks([-row for row in range(len(arms))], arms)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.supxlabel('points from plain: mean, 95 %, and the seeds', fontsize='medium')
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    with write_atomically(path) as aside:
        figure.savefig(aside, dpi=80, format='png')
