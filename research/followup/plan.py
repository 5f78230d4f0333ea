"""The protocol of the follow-up: its stages, in the order in which they run, and the decisions between them.

Every decision is made by this module from the logs. It was committed before the first run, except
``Protocol.list_added_runs``, which was added while F1 ran.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch

from research.statistics import fit_block_design
from research.systems.bert import Bert
from research.systems.runs import Log, System, read_log, train

from .arms import CONDITIONED, DOSED, LARGER, PLAIN, RANDOM, RESCALED, WIDE, Arm, build_initial_model, widen
from .xcit import XCiT

SYSTEMS: dict[str, System] = dict(xcit=XCiT(), bert=Bert(steps=2000, tests=10_000))
# For one GPU: XCiT-S12 on ten times as many pictures, of 112 pixels, with 196 tokens; ten epochs, too.
LARGE: dict[str, System] = dict(
    xcit=XCiT(pictures=60_000, size=112, layers=12, width=384, heads=8, tokens=196, batch=256, lr=1e-3, steps=2340)
)
RATES = (1e-3, 2e-3, 4e-3)  # learning rates of BERT
SCALE_SEEDS, TUNING_SEEDS, BERT_SEEDS = range(101, 104), range(111, 113), range(121, 136)
XCIT_SEEDS, MORE_XCIT_SEEDS = range(141, 153), range(153, 157)
LOOK_AFTER = 4  # seeds of XCiT
BOUND = 0.02  # nats: the smallest effect of interest, and the residual standard deviation above which seeds are added

Losses = dict[tuple[str, int], float]


@dataclass(frozen=True)
class Run:
    """One training: ``stage`` is the folder of its log."""

    stage: str
    system: System
    arm: Arm
    seed: int

    def read(self, logs: Path) -> Log | None:
        """Read its log; None if it has not finished. Raises: InputError, as read_log does."""
        return read_log(logs / self.stage, self.seed, self.arm.name, self.system)

    def train(self, device: str) -> Log:
        """Train it; on a CPU on one thread: more do not help tensors this small, and would change the rounding."""
        if device == 'cpu':
            torch.set_num_threads(1)

        def build(system: System, _: str, seed: int) -> tuple:
            return build_initial_model(system, self.arm, seed)

        return train(self.system, self.arm.name, self.seed, build, device)


def plan_scale(name: str, system: System) -> list[Run]:
    """Plan F0 for a system: is plain badly scaled?"""
    return [Run(f'scale_{name}', system, arm, seed)
            for seed in SCALE_SEEDS for arm in (PLAIN, CONDITIONED, WIDE)]  # fmt: skip


def plan_tuning(arms: Sequence[Arm]) -> list[Run]:
    """Plan the choice of BERT's learning rates."""
    return [Run(f'tuning_{rate:g}', dataclasses.replace(SYSTEMS['bert'], lr=rate), arm, seed)
            for seed in TUNING_SEEDS for arm in arms for rate in RATES]  # fmt: skip


def plan_bert(arms: Sequence[Arm], rates: dict[str, float]) -> list[Run]:
    """Plan F2, with the learning rate of each arm."""
    return [Run('bert', dataclasses.replace(SYSTEMS['bert'], lr=rates[arm.name]), arm, seed)
            for seed in BERT_SEEDS for arm in arms]  # fmt: skip


def plan_xcit(system: System, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Run]:
    """Plan F1."""
    return [Run('xcit', system, arm, seed) for seed in seeds for arm in arms]


class Protocol:
    """The stages and decisions, as far as the logs allow.

    Args:
        logs: folder of the logs.
        systems: SYSTEMS or LARGE.
    """

    def __init__(self, logs: Path, systems: dict[str, System] = SYSTEMS) -> None:
        self.systems = systems
        self.read = partial(Run.read, logs=logs)

    def collect(self, runs: Sequence[Run]) -> Losses:
        """Collect the held-out cross-entropies of the runs that have finished."""
        return {(run.arm.name, run.seed): log.loss for run in runs if (log := self.read(run))}

    def have_finished(self, runs: Sequence[Run]) -> bool:
        """Check whether all of these runs have a log."""
        return all(self.read(run) for run in runs)

    def choose_base(self, name: str) -> Callable[[Arm], Arm] | None:
        """Choose the baseline of F1 and F2: wide, if wide plain is at least as good as the conditioned arm on 0.02."""
        runs = plan_scale(name, self.systems[name])
        if not self.have_finished(runs):
            return None
        losses = self.collect(runs)
        by_arm = {arm.name: mean(losses[arm.name, seed] for seed in SCALE_SEEDS) for arm in (CONDITIONED, WIDE)}
        return widen if by_arm[WIDE.name] <= by_arm[CONDITIONED.name] else lambda arm: arm

    def list_arms(self, name: str) -> list[Arm] | None:
        """List the arms of F1 (xcit) or F2 (bert); None before F0 has finished."""
        arms = dict(xcit=(PLAIN, CONDITIONED, LARGER, DOSED), bert=(PLAIN, LARGER, CONDITIONED, RESCALED, RANDOM))
        base = self.choose_base(name)
        return [base(arm) for arm in arms[name]] if base else None

    def choose_rates(self) -> dict[str, float] | None:
        """Choose BERT's learning rate for each arm, by the mean cross-entropy of the tuning's seeds."""
        arms = self.list_arms('bert')
        if arms is None or not self.have_finished(runs := plan_tuning(arms)):
            return None
        loss = {(run.arm.name, run.system.lr, run.seed): self.read(run).loss for run in runs}
        return {
            arm.name: min(RATES, key=lambda rate: mean(loss[arm.name, rate, seed] for seed in TUNING_SEEDS))
            for arm in arms
        }

    def list_xcit_runs(self) -> list[Run] | None:
        """List the runs of F1; after four seeds, if their residuals are large, without the dosed arm and with 16 seeds.

        The decision uses the residual standard deviation of the other three arms, and no mean. None before F0 has
        finished.
        """
        arms = self.list_arms('xcit')
        if arms is None:
            return None
        plain, conditioned, larger, _ = (arm.name for arm in arms)
        plan = partial(plan_xcit, self.systems['xcit'])
        first, looked_at = plan(arms, XCIT_SEEDS[:LOOK_AFTER]), plan(arms[:3], XCIT_SEEDS[:LOOK_AFTER])
        if not self.have_finished(looked_at):
            return first
        if fit_block_design(self.collect(looked_at), [plain, conditioned], larger)[plain].residual > BOUND:
            return [*first,
                    *plan(arms[:3], [*XCIT_SEEDS[LOOK_AFTER:], *MORE_XCIT_SEEDS])]  # fmt: skip
        return plan(arms, XCIT_SEEDS)

    def list_added_runs(self) -> list[Run]:
        """List runs that are not registered: XCiT at the scale that F1 does not use, to compare the scales of plain."""
        base = self.choose_base('xcit')
        return plan_xcit(self.systems['xcit'], [PLAIN if base(PLAIN).wide else WIDE], XCIT_SEEDS) if base else []

    def plan(self) -> Iterator[list[Run]]:
        """Yield the stages; each is planned when the one before it has finished."""
        for name, system in self.systems.items():
            yield plan_scale(name, system)
        if 'bert' in self.systems:
            yield plan_tuning(self.list_arms('bert'))
            yield plan_bert(self.list_arms('bert'), self.choose_rates())
        yield self.list_xcit_runs()
        yield self.list_xcit_runs()  # after the look
        yield self.list_added_runs()
