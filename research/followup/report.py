"""Write the report of the follow-up from the logs of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from jinja2 import Template

from research.markdown import format_table
from research.statistics import LEVEL, Contrast, adjust_p_values, compute_chance_limit, fit_block_design
from spec_mmdet.files import write

from .arms import CONDITIONED, PLAIN, WIDE
from .plan import BOUND, RATES, Losses, Protocol, Run, plan_bert, plan_scale, plan_tuning

POWER = 0.8
Pair = tuple[str, str, Sequence[str]]  # an arm, its reference, and the arms that are fitted with them


def write_report(protocol: Protocol, path: Path) -> Path:
    """Write the report as Markdown; returns ``path``."""
    template = Path(__file__).with_name('template.md').read_text('utf-8')
    sections = [*report_scale(protocol), *report_xcit(protocol)]
    sections += report_bert(protocol) if 'bert' in protocol.systems else []
    text = Template(template, keep_trailing_newline=True).render(protocol.systems, sections='\n'.join(sections))
    write(path, text)
    return path


def tabulate(protocol: Protocol, runs: Sequence[Run]) -> list[str]:
    """Tabulate the arms of a stage: means over the runs that have finished."""
    rows = []
    for name in dict.fromkeys(run.arm.name for run in runs):
        logs = [log for run in runs if run.arm.name == name and (log := protocol.read(run))]
        if logs:
            losses = [log.loss for log in logs]
            kappas = [mean(log.kappa['head'][when] for log in logs) for when in (0, 1)]
            rows.append([name, len(logs), f'{mean(losses):.4f}', f'{min(losses):.3f} to {max(losses):.3f}',
                         f'{100 * mean(log.accuracy for log in logs):.2f}', '{:.3g} / {:.3g}'.format(*kappas),
                         f'{logs[0].settings["lr"]:g}'])  # fmt: skip
    columns = ['arm', 'runs', 'cross-entropy', 'range', 'accuracy, %', 'kappa of a head, before / after', 'rate']
    return [*format_table(columns, rows), '']


def tabulate_rates(protocol: Protocol, tuning: Sequence[Run]) -> list[str]:
    """Tabulate the mean cross-entropy of the tuning's runs by arm and learning rate."""
    losses: dict[str, dict[float, list[float]]] = {}
    for run in tuning:
        losses.setdefault(run.arm.name, {}).setdefault(run.system.lr, []).append(protocol.read(run).loss)
    rows = [[name, *(f'{mean(of_arm[rate]):.3f}' for rate in RATES)] for name, of_arm in losses.items()]
    return [*format_table(['cross-entropy with the rate', *(f'{rate:g}' for rate in RATES)], rows), '']


def format_contrast(contrast: Contrast) -> str:
    """Format a contrast with its 95 % confidence interval, in nats."""
    margin = contrast.compute_margin()
    return f'{contrast.value:+.4f} [{contrast.value - margin:+.4f}, {contrast.value + margin:+.4f}]'


def judge(contrast: Contrast, arm: str) -> str:
    """Put the result of the primary contrast of an arm in words."""
    equivalent = contrast.test_equivalence(BOUND)
    if contrast.p < LEVEL:
        verdict = 'lower' if contrast.value < 0 else 'higher'
        size = f', but by less than {BOUND} nats (TOST, p {equivalent:.2g})' if equivalent < LEVEL else ''
        return f'the cross-entropy of {arm} is {verdict} (p {contrast.p:.2g}){size}'
    if equivalent < LEVEL:
        return f'equal within {BOUND} nats (TOST, p {equivalent:.2g})'
    return f'not significant (p {contrast.p:.2g}), and not shown to be within {BOUND} nats (TOST, p {equivalent:.2g})'


def fit(losses: Losses, pair: Pair) -> Contrast | None:
    """Fit a contrast; None if there are too few runs."""
    arm, reference, together = pair
    return fit_block_design(losses, [name for name in together if name != reference], reference).get(arm)


def tabulate_contrasts(losses: Losses, pairs: Sequence[Pair], registered: bool) -> list[str]:
    """Tabulate the contrasts that can be fitted; p-values of registered ones are adjusted together (Holm)."""
    found = [(f'{pair[0]} - {pair[1]}', contrast) for pair in pairs if (contrast := fit(losses, pair))]
    if not found:
        return []
    p_values = [contrast.p for _, contrast in found]
    title, title_of_p = 'contrast, not registered', 'p, not adjusted'
    if registered:
        title, title_of_p, p_values = 'secondary contrast', 'p after Holm', adjust_p_values(p_values)
    rows = [[name, format_contrast(contrast), f'{p:.2g}'] for (name, contrast), p in zip(found, p_values)]
    return [*format_table([title, 'difference, nats', title_of_p], rows), '']


def report_contrasts(losses: Losses, primary: Pair, secondary: Sequence[Pair], added: Sequence[Pair] = ()) -> list[str]:
    """Report the contrasts of a stage.

    Args:
        losses: of its runs.
        primary: the registered primary contrast.
        secondary: the registered secondary contrasts.
        added: contrasts that are not registered.
    """
    arm, reference, _ = primary
    if not (contrast := fit(losses, primary)):
        return ['Too few runs for a contrast.', '']
    detected = f'{contrast.compute_detectable(POWER):.4f} nats would be detected with a power of {100 * POWER:.0f} %'
    lines = [f'**Primary contrast, {arm} - {reference}: {format_contrast(contrast)} nats: {judge(contrast, arm)}.** '
             f'Residual standard deviation {contrast.residual:.4f}, {contrast.freedom} degrees of freedom; '
             f'a difference of {detected}.', '']  # fmt: skip
    return [*lines, *tabulate_contrasts(losses, secondary, registered=True),
            *tabulate_contrasts(losses, added, registered=False)]  # fmt: skip


def report_scale(protocol: Protocol) -> list[str]:
    """Report F0."""
    lines = ['## F0: the scale of plain', '']
    for name, system in protocol.systems.items():
        runs = plan_scale(name, system)
        base, losses = protocol.choose_base(name), protocol.collect(runs)
        chosen = {True: f'*{WIDE.name}*', False: f'*{PLAIN.name}*'}
        decision = 'not decided: runs are missing' if base is None else chosen[base(PLAIN).wide]
        lines += [f'{name}, {len(losses)} of {len(runs)} runs. Baseline of the main experiment: {decision}.', '']
        if losses:
            arms = [arm.name for arm in (PLAIN, CONDITIONED, WIDE)]
            pairs = [(WIDE.name, PLAIN.name, arms), (WIDE.name, CONDITIONED.name, arms)]
            lines += tabulate(protocol, runs) + tabulate_contrasts(losses, pairs, registered=False)
    return lines


def report_xcit(protocol: Protocol) -> list[str]:
    """Report F1."""
    lines, runs = ['## F1: XCiT', ''], protocol.list_xcit_runs()
    if not runs:
        return [*lines, 'Not started.', '']
    losses, added = protocol.collect(runs), protocol.list_added_runs()
    plain, conditioned, larger, dosed = (arm.name for arm in protocol.list_arms('xcit'))
    seeds = dict.fromkeys(run.seed for run in runs)
    whole = {
        key: loss for key, loss in losses.items() if all((a, key[1]) in losses for a in (plain, conditioned, larger))
    }
    three = [plain, conditioned, larger]
    secondary = [(conditioned, plain, three), (larger, plain, three), (dosed, plain, [plain, dosed])]
    system = protocol.systems['xcit']
    chance = compute_chance_limit(system.tests, system.score_rules()['chance'])
    logs = [log for run in runs if (log := protocol.read(run))]
    at_chance = [f'{name}: {sum(log.arm == name and log.accuracy <= chance for log in logs)} of '
                 f'{sum(log.arm == name for log in logs)}' for name in (*three, dosed)]  # fmt: skip
    of_added, scales = protocol.collect(added), (WIDE.name, PLAIN.name, [WIDE.name, PLAIN.name])
    finished = f'{len(losses)} of {len(runs)} runs; {len(seeds)} seeds.'
    more = f' Not registered: {len(of_added)} of {len(added)} runs of *{added[0].arm.name}*.'
    return [*lines, finished + more, '', *tabulate(protocol, [*runs, *added]),
            *report_contrasts(whole, (conditioned, larger, three), secondary),
            *tabulate_contrasts(losses | of_added, [scales], registered=False),
            f'Runs at chance (accuracy of at most {100 * chance:.1f} %): {", ".join(at_chance)}.', '']  # fmt: skip


def report_bert(protocol: Protocol) -> list[str]:
    """Report F2."""
    lines, arms = ['## F2: BERT', ''], protocol.list_arms('bert')
    if not arms:
        return [*lines, 'Not started.', '']
    tuning, rates = plan_tuning(arms), protocol.choose_rates()
    lines += [
        f'Tuning of the learning rate: {sum(bool(protocol.read(run)) for run in tuning)} of {len(tuning)} runs.',
        '',
    ]
    if not rates:
        return lines
    lines += tabulate_rates(protocol, tuning)
    runs = plan_bert(arms, rates)
    losses = protocol.collect(runs)
    names = [arm.name for arm in arms]
    plain, larger, conditioned, rescaled, random = names
    secondary = [(random, larger, names), (conditioned, random, names), (rescaled, plain, names)]
    added = [(arm, plain, names) for arm in (conditioned, larger, random)]
    return [*lines, f'{len(losses)} of {len(runs)} runs.', '', *tabulate(protocol, runs),
            *report_contrasts(losses, (conditioned, larger, names), secondary, added)]  # fmt: skip
