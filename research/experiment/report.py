"""Write the report of the experiment from the logs of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib.figure import Figure
from scipy import stats

from research.markdown import format_table
from research.statistics import LEVEL, Effect, compute_chance_limit, estimate_effects
from spec_mmdet.evaluation.comparison import Run, draw_curve, format_spread, group_runs
from spec_mmdet.files import write, write_atomically

from ..scenes import Figures, Garments
from .arms import LAMBDA_10, SIZES, read_logs

KINDS = ('box', 'mask')
KAPPAS = ('kappa_Q', 'kappa_K', 'kappa_V', 'kappa_J')
FIRST = 'plain'  # the arm that the others are compared with
PAPER = 'full, 10'
TUNED = 'Fine-tuned from pretraining'
CONTROLS = {
    'W0 + 10 I, decayed to 0': 'the same start; weight decay pulls towards 0, but hardly moves C in this schedule',
    'full, 10, faster rows': 'higher learning rate of queries and keys, and of values, which are in the same tensor',
}
# When a condition number is read: the stage whose curve contains it, and the index in that curve.
MOMENTS = {'at the start': ('pretraining', 0), 'pretrained': ('pretraining', -1), 'fine-tuned': ('detection', -1)}
# The paper's gains with lambda = 10, for its detector and its largest classifier.
GAINS = {'box AP': 0.007, 'mask AP': 0.004, 'top-1': 0.009}


def write_report(folder: Path, path: Path) -> Path:
    """Write the report, and its plots beside the logs.

    Args:
        folder: contains a folder of logs for each size of the experiment.
        path: the Markdown file to write.

    Returns:
        ``path``.
    """
    sections, claims = [], dict(detection=[], classification=[], kappa=[])
    for subfolder in sorted(subfolder for subfolder in folder.glob('*') if subfolder.is_dir()):
        logs = read_logs(subfolder)
        logs.sort(key=lambda log: (log['arm'] != FIRST, log['group'] == LAMBDA_10))  # stays sorted by seed
        if logs:
            sections += write_section(subfolder, logs, path.parent, claims)
    template = Path(__file__).with_name('template.md').read_text('utf-8')
    text = '\n'.join(sections).strip() or 'There is no finished run yet.'
    write(path, Template(template, keep_trailing_newline=True).render(sections=text, claims=claims))
    return path


def write_section(folder: Path, logs: Sequence[dict], root: Path, claims: dict[str, list[str]]) -> list[str]:
    """Write the report of one size, and add its results to ``claims``.

    Args:
        folder: contains the logs; the plots are written into it.
        logs: of the runs.
        root: the folder of the report; links are relative to it.
        claims: sentences about detection, classification and kappa, for the comparison with the paper.

    Returns:
        Lines of Markdown.
    """
    hours = sum(log['seconds'] for log in logs) / 3600
    screening = sorted((log for log in logs if log['stage'] == 'screening'), key=get_form_and_lambda)
    tuned, scratch = ([log for log in logs if log['stage'] == stage] for stage in ('pretrained', 'scratch'))
    stages = {TUNED: tuned, 'From scratch': scratch}
    effects = {title: compare_arms(runs) for title, runs in stages.items() if runs}
    commits = sorted({str(log['commit'])[:12] for log in logs})
    lines = [
        f'## Size {folder.name}\n',
        f'{len(logs)} runs: {len(screening)} of the screening, {len(tuned)} fine-tuned, {len(scratch)} from scratch; '
        f'{hours:.1f} hours of training, several runs at a time; '
        f'{", ".join(sorted({log["device"] for log in logs}))}; commits {", ".join(commits)}.\n',
        '### What it supports\n',
        *summarise(effects),
        *count_runs_at_chance(tuned, folder.name),
        '',
    ]
    if screening:
        lines += ['### Screening of lambda, one seed\n', *format_table(
            ['arm', 'lambda', 'top-1', 'box AP', 'mask AP', *KAPPAS],
            [[log['arm'], (log['conditioning'] or {}).get('lam', ''),
              format_last(log, 'pretraining', 'accuracy/top1', '.1f'),
              *(f'{100 * log["ap"][kind]:.1f}' for kind in KINDS),
              *(format_last(log, 'detection', name, '.3g') for name in KAPPAS)]
             for log in screening],
        ), '', 'kappa is the median over the layers at the end of fine-tuning.\n']  # fmt: skip
    for title, of_stage in effects.items():
        lines += [f'### {title}\n', *tabulate_arms(stages[title], of_stage), '', *compare_controls(stages[title])]
    if tuned and scratch:
        lines += compare_with_scratch(tuned, scratch)
    if tuned:
        differences, curves = folder / 'differences.png', folder / 'ap.png'
        save_figure(draw_effects(effects[TUNED]), differences)
        save_figure(draw_curve(convert_to_runs(tuned), 'box AP'), curves)
        lines += [f'![differences]({differences.relative_to(root)})\n', f'![box AP]({curves.relative_to(root)})\n']
        lines += tabulate_kappa(tuned)
    fine_tuned = [*screening, *tuned]
    if len(fine_tuned) > 4:
        lines += correlate(fine_tuned, folder / 'kappa.png', root, claims['kappa'], folder.name)
    for row, names in (('detection', [f'{kind} AP' for kind in KINDS]), ('classification', ['top-1'])):
        of_paper = [effect for effect in effects.get(TUNED, []) if effect.arm == PAPER and effect.outcome in names]
        if of_paper:
            claims[row].append(f'{folder.name}: {", ".join(f"{effect.outcome} {effect}" for effect in of_paper)}.')
    return lines


def get_form_and_lambda(log: dict) -> tuple[bool, float]:
    """Return the sort key of the screening's table: plain, the full form, per head, each by lambda."""
    conditioning = log['conditioning'] or dict(per_head=False, lam=0)
    return conditioning['per_head'], conditioning['lam']


def group_by_arm(logs: Sequence[dict]) -> dict[str, list[dict]]:
    """Group logs by arm, in the logs' order."""
    arms: dict[str, list[dict]] = {}
    for log in logs:
        arms.setdefault(log['arm'], []).append(log)
    return arms


def get_kappa(log: dict, name: str, moment: str) -> float:
    """Return a condition number of a pretrained run at one of :data:`MOMENTS`."""
    stage, index = MOMENTS[moment]
    return log['curves'][stage][name][1][index]


def format_last(log: dict, stage: str, name: str, form: str) -> str:
    """Format the last value of a curve; return '' if there is no such curve."""
    values = log['curves'].get(stage, {}).get(name, [[], []])[1]
    return format(values[-1], form) if values else ''


def convert_to_runs(logs: Sequence[dict]) -> list[Run]:
    """Convert logs to runs of :mod:`spec_mmdet.evaluation.comparison`."""
    return [
        Run(log['arm'], log['seed'], Path(), log['ap'], drawn={},
            curves={name: (xs, ys) for name, (xs, ys) in log['curves']['detection'].items()})
        for log in logs
    ]  # fmt: skip


def get_outcomes(log: dict) -> dict[str, float]:
    """Return the results of a run, each from 0 to 1."""
    outcomes = {f'{kind} AP': log['ap'][kind] for kind in KINDS}
    if 'pretraining' in log['curves']:
        outcomes['top-1'] = log['curves']['pretraining']['accuracy/top1'][1][-1] / 100
    return outcomes


def compare_arms(logs: Sequence[dict], reference: str = FIRST) -> list[Effect]:
    """Estimate the effect of every arm of a stage. Arms of lambda = 10 vary more with the seed and are fitted apart.

    Args:
        logs: of one stage.
        reference: the arm from which differences are taken.

    Returns:
        The effects by outcome and arm, without those that have too few runs to estimate the error.
    """
    runs = {(log['arm'], log['seed']): get_outcomes(log) for log in logs}
    names = get_outcomes(logs[0]) if logs else ()
    outcomes = {name: {run: values[name] for run, values in runs.items()} for name in names}
    return estimate_effects(outcomes, {log['arm']: log['group'] for log in logs}, reference)


def tabulate_arms(logs: Sequence[dict], effects: Sequence[Effect]) -> list[str]:
    """Tabulate the results of a stage, a row for each arm."""
    names = list(get_outcomes(logs[0]))
    rows = []
    for arm, runs in group_by_arm(logs).items():
        differences = {}
        for effect in (effect for effect in effects if effect.arm == arm):
            pairs = ', '.join(f'{100 * pair:+.1f}' for pair in effect.pairs)
            differences[effect.outcome] = f'{effect}, p {effect.p:.2g}<br>({pairs})'
        rows.append([
            arm, ', '.join(str(log['seed']) for log in runs),
            *(format_spread([get_outcomes(log)[name] for log in runs]) for name in names),
            *(differences.get(name, '') for name in names),
        ])  # fmt: skip
    return format_table(['arm', 'seeds', *names, *(f'{name}, from plain' for name in names)], rows)


def count_runs_at_chance(logs: Sequence[dict], size: str) -> list[str]:
    """Report how many pretrainings of each arm are at chance: a binomial test against guessing."""
    classes = len((Garments if size.endswith('-garments') else Figures()).pretraining)
    crops = SIZES[size.removesuffix('-garments')].crops // 10
    limit = compute_chance_limit(crops, 1 / classes)
    lines = []
    for arm, runs in group_by_arm(logs).items():
        at_chance = sum(get_outcomes(log)['top-1'] <= limit for log in runs)
        if at_chance:
            lines.append(f'  * {arm}: {at_chance} of {len(runs)} runs')
    rule = f'top-1 of at most {100 * limit:.1f} %, where guessing gives {100 / classes:.1f} %'
    if not lines:
        return [f'* No pretraining stayed at chance ({rule}).'] if logs else []
    return [
        f"* Pretrainings that stayed at chance ({rule}); their arms' means mix them with runs that learned:",
        *lines,
    ]


def compare_controls(logs: Sequence[dict]) -> list[str]:
    """Compare the controls of lambda = 10 with that arm."""
    effects = compare_arms([log for log in logs if log['group'] == LAMBDA_10], PAPER)
    results = {arm: ', '.join(f'{one.outcome} {one}' for one in effects if one.arm == arm) for arm in CONTROLS}
    lines = [f'* {arm} ({CONTROLS[arm]}): {text}' for arm, text in results.items() if text]
    return [f'Differences of the controls from *{PAPER}*:\n', *lines, ''] if lines else []


def compare_with_scratch(tuned: Sequence[dict], scratch: Sequence[dict]) -> list[str]:
    """List the gain of pretraining over training from scratch, for the same number of detection epochs."""
    lines = ['Gain of pretraining over training from scratch, for the same number of detection epochs:\n']
    for arm, runs in group_runs(convert_to_runs(scratch)).items():
        others = {run.seed: run for run in convert_to_runs(tuned) if run.arm == arm}
        pairs = [(others[run.seed], run) for run in runs if run.seed in others]
        if pairs:
            gains = [
                f'{kind} AP {format_spread([ours.ap[kind] - theirs.ap[kind] for ours, theirs in pairs])}'
                for kind in KINDS
            ]
            lines.append(f'* {arm}: {", ".join(gains)} ({len(pairs)} seeds)')
    return [*lines, '']


def tabulate_kappa(logs: Sequence[dict]) -> list[str]:
    """Tabulate the condition numbers at :data:`MOMENTS`."""
    rows = []
    for arm, runs in group_by_arm(logs).items():
        means = ([stats.gmean([get_kappa(log, name, moment) for log in runs]) for moment in MOMENTS] for name in KAPPAS)
        rows.append([arm, *(' / '.join(f'{mean:.3g}' for mean in row) for row in means)])
    return [
        '### Condition numbers\n',
        f'Each cell contains the values {" / ".join(MOMENTS)}: medians over the layers, geometric means over the '
        "seeds. They are condition numbers of W + C, or of W without a C: of each head's rows in the *per head* arms, "
        "of full projections in the others. The conditioned initialisation conditions each head's rows, so its full "
        "projections can have any kappa. J is the attention's Jacobian on an image.\n",
        *format_table(['arm', *KAPPAS], rows),
        '',
    ]


def correlate(logs: Sequence[dict], path: Path, root: Path, claims: list[str], name: str) -> list[str]:
    """Correlate the arms' mean condition numbers with their mean AP, and plot the runs."""
    figure = Figure(figsize=(14, 4), layout='constrained')
    axes = figure.subplots(1, 4, sharey=True)
    for axis, kappa in zip(axes, KAPPAS):
        for i, (arm, runs) in enumerate(group_by_arm(logs).items()):
            axis.plot([get_kappa(log, kappa, 'fine-tuned') for log in runs], [100 * log['ap']['box'] for log in runs],
                      'osv^'[i // 10 % 4], color=f'C{i % 10}', markersize=4, label=arm)  # fmt: skip
        axis.set(xscale='log', title=kappa)
        axis.grid(alpha=0.3)
    figure.supylabel('box AP')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    save_figure(figure, path)
    lines = [
        '### Does a condition number predict AP?\n',
        "Spearman's rank correlation of condition number with box AP over arms: an arm counts once, with the means of "
        'its fine-tuned runs (geometric for kappa), because its runs are not independent. Arms of the screening have '
        'one seed. A negative correlation supports the claim that better conditioned is better.\n',
    ]
    for title, runs in (
        ('all', logs),
        ('without the arms of lambda = 10', [log for log in logs if log['group'] != LAMBDA_10]),
    ):
        if (arms := len(group_by_arm(runs))) > 4:
            rows, summary = rank(runs)
            claims.append(f'{name}, {title}: {summary}.')
            columns = [f'{title}, {arms} arms', *MOMENTS]
            lines += [*format_table(columns, rows), '', f'{summary[0].upper()}{summary[1:]}.\n']
    return [*lines, f'![box AP over condition numbers]({path.relative_to(root)})\n']


def rank(logs: Sequence[dict]) -> tuple[list[list[str]], str]:
    """Compute rank correlations of the arms' means with box AP: a row for each condition number, and a summary."""
    arms = group_by_arm(logs).values()
    ap = [float(np.mean([log['ap']['box'] for log in runs])) for runs in arms]
    threshold = LEVEL / (len(KAPPAS) * len(MOMENTS))
    rows, significant = [], []
    for kappa in KAPPAS:
        row = [kappa]
        for moment in MOMENTS:
            test = stats.spearmanr([stats.gmean([get_kappa(log, kappa, moment) for log in runs]) for runs in arms], ap)
            row.append(f'{test.statistic:+.2f} (p {test.pvalue:.2g})')
            if test.pvalue < threshold:
                significant.append(f'{kappa} {moment}, {"as claimed" if test.statistic < 0 else "against the claim"}')
        rows.append(row)
    named = f': {"; ".join(significant)}' if significant else ''
    return rows, (
        f'{len(significant)} of {len(KAPPAS) * len(MOMENTS)} rank correlations of condition number with box AP over '
        f'{len(arms)} arms are significant (p < {threshold:.2g}){named}'
    )


def summarise(by_stage: dict[str, list[Effect]]) -> list[str]:
    """List the arms that are better or worse than plain, and whether the paper's gain could have been detected."""
    lines = []
    for title, effects in by_stage.items():
        if not effects:
            lines.append(f'* {title}: too few runs with the same seeds yet; no conclusion is possible.')
            continue
        lines.append(f'* {title}: significant differences from plain (p < {LEVEL:g} after Holm):')
        for name, gain in GAINS.items():
            of_outcome = [effect for effect in effects if effect.outcome == name]
            if not of_outcome:
                continue
            significant = [effect for effect in of_outcome if effect.p < LEVEL]
            signs = (
                [f'{effect.arm} ({effect}, p {effect.p:.2g})' for effect in significant if (effect.value > 0) == better]
                for better in (True, False)
            )
            better, worse = map('; '.join, signs)
            width = min((effect.interval[1] - effect.interval[0]) / 2 for effect in of_outcome)
            seen = f", wider than the paper's gain of {100 * gain:.1f}" * (width > gain)
            lines += [
                f'  * {name}: better: {better or "none"}. Worse: {worse or "none"}.',
                f'    The narrowest 95 % interval has a half-width of {100 * width:.1f} points{seen}.',
            ]
    return lines or ['* Nothing yet: no run with several seeds is finished.']


def draw_effects(effects: Sequence[Effect]) -> Figure:
    """Draw every effect with its interval and its pairs."""
    names = list(dict.fromkeys(effect.outcome for effect in effects))
    arms = list(dict.fromkeys(effect.arm for effect in effects))
    figure = Figure(figsize=(11, 1 + 0.3 * len(arms)), layout='constrained')
    for axis, name in zip(figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0], names):
        for effect in effects:
            if effect.outcome == name:
                row = -arms.index(effect.arm)
                axis.plot([100 * end for end in effect.interval], [row, row], color='C0', linewidth=3)
                axis.plot([100 * pair for pair in effect.pairs], [row] * len(effect.pairs), '|', color='gray')
                axis.plot(100 * effect.value, row, 'ko', markersize=4)
        axis.axvline(0, color='gray', linewidth=1)
        axis.set_yticks([-row for row in range(len(arms))], arms)
        axis.set_title(name)
        axis.grid(alpha=0.3)
    figure.supxlabel('difference from plain in points: mean, 95 % interval, single seeds', fontsize='medium')
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a plot atomically."""
    with write_atomically(path) as file:
        figure.savefig(file, dpi=80, format='png')
