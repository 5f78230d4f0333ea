"""What the systems share: the arms, and one run, from its initial weights to its log."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..conditioning import Corrections, Report, condition, find_projections, measure
from ..errors import InputError
from ..files import write

NOT_ASKED = -100  # a target that counts in no loss and no accuracy, as cross_entropy has it
HELD_OUT = 2**32  # the seed of what is tested on; those of trainings are below

# What each arm passes to condition(); the first does not condition. A lambda of '2 sigma' is twice the largest
# sigma_max of the initial projections. The last has the size of W + C, and the condition numbers of W.
_FORMS = {'lambda 2 sigma': dict(lam='2 sigma'), 'lambda 10': dict(lam=10.0), 'svd': dict(type='svd')}
LARGER = 'larger W'
ARMS: dict[str, dict | None] = {
    'plain': None,
    **_FORMS,
    **{f'{name}, per head': dict(form, per_head=True) for name, form in _FORMS.items()},
    LARGER: _FORMS['lambda 2 sigma'],
}


@dataclass(frozen=True)
class Log:
    """What is left of a run that has finished.

    Attributes:
        arm, seed: which run of its system it is.
        settings: the system's.
        lam: lambda, where the arm has one.
        keys: to how many keys a query attends at the start: median over the layers, independent normalised tokens.
        accuracy, loss: on what is held out, after the last step; loss is the mean cross-entropy.
        curve: accuracy after half of the steps, and after all.
        kappa: 'whole' and 'head', of W + C where there is a C, before and after training: medians over the layers.
        seconds: that it took.
        torch: PyTorch's version.
    """

    arm: str
    seed: int
    settings: dict[str, object]
    lam: float | None
    keys: float
    accuracy: float
    loss: float
    curve: list[float]
    kappa: dict[str, tuple[float, float]]
    seconds: float
    torch: str


@dataclass(frozen=True)
class System(ABC):
    """A model and its task; the fields of a subclass are all that a run depends on beside arm and seed.

    Attributes:
        steps: of training.
        batch: examples a step. No example is seen twice, but for text, which is drawn from where it is.
        lr: of AdamW, after a warm-up over the first tenth and down to 0 by a cosine.
        weight_decay: of AdamW; where it is not 0, the corrections are kept out of it.
        tests: how many held-out examples are tested on.
        tokens: in an example.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float
    tests: int
    tokens: int

    needs = 'transformers'  # what the model is from
    examples = 'examples'  # what they are

    @abstractmethod
    def model(self) -> nn.Module:
        """A new model, its weights drawn from PyTorch's own generator."""

    @abstractmethod
    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """What the model says of inputs; shape that of the targets, and the classes as a last dimension."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Examples: inputs, shape (count, ...), and targets, shape (count,) or one for each token."""

    @abstractmethod
    def rules(self) -> dict[str, float]:
        """How often simple rules are right on what is tested on, by their names: what a model has to beat."""

    def held_out(self) -> tuple[Tensor, Tensor]:
        """What is tested on, the same for all runs."""
        return self.draw(self.tests, torch.Generator().manual_seed(HELD_OUT), held_out=True)

    def settings(self) -> dict[str, object]:
        """What a run depends on beside arm and seed."""
        return asdict(self)


def initial(system: System, arm: str, seed: int) -> tuple[nn.Module, Corrections, float | None]:
    """A system's model at the start of a run: the same W in all arms of a seed, and the arm's C on it.

    In the arm 'larger W' there is no C, but W multiplied: each layer's has the Frobenius norm of its W + C with lambda
    of 2 sigma.

    Returns:
        the model, the corrections to keep fixed, and lambda, where there is one.
    """
    torch.manual_seed(seed)
    model = system.model()
    form = ARMS[arm]
    if form is None:
        return model, Corrections(), None
    lam = form.get('lam')
    if lam == '2 sigma':
        lam = 2 * max(row.sigma_max for row in measure(model))
    corrections = condition(model, **dict(form, lam=lam)).corrections
    if arm == LARGER:
        for entry in corrections.values():
            W = entry.weight.detach() - entry.C
            entry.weight.data = W * (entry.weight.norm() / W.norm())
        return model, Corrections(), None
    return model, corrections, lam


def condition_numbers(model: nn.Module) -> dict[str, float]:
    """kappa of what the model multiplies by, medians over the layers: of whole projections and of single heads."""
    found = list(find_projections(model))
    reports = dict(whole=Report(found), head=Report(found, by_head=True))
    return {name: median(row.kappa for row in report) for name, report in reports.items()}


@torch.no_grad()
def evaluate(system: System, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and mean loss over the targets that count."""
    model.eval()
    logits = torch.cat([system.logits(model, some) for some in inputs.split(100)])
    model.train()
    logits, targets = (of[targets != NOT_ASKED] for of in (logits, targets))
    return (logits.argmax(-1) == targets).double().mean().item(), cross_entropy(logits, targets).item()


def run(system: System, arm: str, seed: int) -> Log:
    """Train a system's model once, and measure it.

    Raises:
        InputError: if the loss stops being a number.
    """
    start = time.time()
    model, corrections, lam = initial(system, arm, seed)
    kappa = condition_numbers(model)
    keys = median(left for left, _ in measure(model).count_effective_keys(system.tokens))
    optimizer = torch.optim.AdamW(model.parameters(), system.lr, weight_decay=system.weight_decay)
    if corrections and system.weight_decay:
        corrections.keep_fixed(optimizer)
    warm_up = max(1, system.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / system.steps)) / 2)
    )
    held_out = system.held_out()
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(1, system.steps + 1):
        inputs, targets = system.draw(system.batch, generator)
        error = cross_entropy(system.logits(model, inputs).flatten(0, -2), targets.flatten(), ignore_index=NOT_ASKED)
        if not error.isfinite():
            raise InputError(f'{arm}, seed {seed}: the loss is {error.item()} at step {step}: nothing to measure')
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        if 2 * step % system.steps < 2:
            accuracy, loss = evaluate(system, model, *held_out)
            curve.append(accuracy)
    after = condition_numbers(model)
    return Log(
        arm=arm,
        seed=seed,
        settings=system.settings(),
        lam=lam,
        keys=keys,
        accuracy=accuracy,
        loss=loss,
        curve=curve,
        kappa={of: (kappa[of], after[of]) for of in kappa},
        seconds=round(time.time() - start, 1),
        torch=torch.__version__,
    )


def log_of(folder: Path, seed: int, arm: str) -> Path:
    """Where a run's log is."""
    return folder / f'{arm.replace(",", "").replace(" ", "_")}_{seed}.json'


def read_log(folder: Path, seed: int, arm: str, system: System) -> Log | None:
    """The log of a run, if it has finished.

    Raises:
        InputError: if it is none, or of another run: of other settings than the system's.
    """
    path = log_of(folder, seed, arm)
    if not path.exists():
        return None
    try:
        log = Log(**json.loads(path.read_text(encoding='utf-8')))
        theirs = dict(log.settings, arm=log.arm, seed=log.seed)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f'{path} is no log of a finished run ({error}); remove it to have that run again') from error
    ours = dict(system.settings(), arm=arm, seed=seed)
    other = [f'{name} {theirs.get(name)}, not {ours[name]}' for name in ours if theirs.get(name) != ours[name]]
    if other:
        raise InputError(f'{path} is the log of another run ({"; ".join(other)}); --out names another folder')
    return log


def write_log(folder: Path, log: Log) -> None:
    """Keep the log of a finished run."""
    write(log_of(folder, log.seed, log.arm), json.dumps(asdict(log)) + '\n')
