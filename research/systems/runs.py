"""The arms of the small systems, and the training of one run, from its initial weights to its log."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spec_mmdet.conditioning import Corrections, Report, condition, find_projections, measure
from spec_mmdet.errors import InputError
from spec_mmdet.files import write

IGNORED = -100  # a target that counts in neither loss nor accuracy: the default of cross_entropy
HELD_OUT = 2**32  # the seed of the test data; the seeds of trainings are smaller

# The arguments of condition() for each arm; plain is not conditioned. A lambda of '2 sigma' is twice the largest
# sigma_max of the initial projections. The last arm has the size of W + C and the condition numbers of W.
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
    """The log of a finished run.

    Attributes:
        arm, seed: identify the run within its system.
        settings: of the system.
        lam: lambda, if the arm has one.
        keys: effective number of keys of a query at the start: median over the layers, independent normalised tokens.
        accuracy, loss: on the held-out data, after the last step; loss is the mean cross-entropy.
        curve: accuracy after half of the steps, and after all.
        kappa: 'whole' and 'head', of W + C, or of W without C, before and after training: medians over the layers.
        seconds: its duration.
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
    """A model and its task; a run depends only on the fields of a subclass, its arm and its seed.

    Attributes:
        steps: of training.
        batch: batch size; the examples of every step are drawn anew.
        lr: of AdamW, after a warm-up over the first tenth and down to 0 by a cosine.
        weight_decay: of AdamW; it does not act on the corrections.
        tests: number of held-out examples.
        tokens: number of tokens of an example.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float
    tests: int
    tokens: int

    needs = 'transformers'  # the package of the model
    examples = 'examples'  # their name in the table

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Build a model, its weights drawn from PyTorch's global generator."""

    @abstractmethod
    def compute_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Compute logits; their shape is that of the targets, with the classes as a last dimension."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Draw examples: inputs, shape (count, ...), and targets, shape (count,) or (count, tokens)."""

    def clip_gradients(self, model: nn.Module) -> None:  # noqa: B027 - most systems do not clip
        """Clip the gradients before a step; by default they stay as they are."""

    @abstractmethod
    def score_rules(self) -> dict[str, float]:
        """Return the accuracy of simple rules on the held-out data, by their names: baselines for a model."""

    def draw_held_out(self) -> tuple[Tensor, Tensor]:
        """Draw the held-out examples, the same for all runs."""
        return self.draw(self.tests, torch.Generator().manual_seed(HELD_OUT), held_out=True)

    def get_settings(self) -> dict[str, object]:
        """Return everything that a run depends on besides its arm and seed."""
        return asdict(self)


def build_initial_model(system: System, arm: str, seed: int) -> tuple[nn.Module, Corrections, float | None]:
    """Build the model that a run starts from: the same W in all arms of a seed, plus the C of the arm.

    The arm 'larger W' has no C: the W of each layer is scaled to the Frobenius norm of its W + C with lambda = 2 sigma.

    Returns:
        The model, the corrections to keep fixed, and lambda, if the arm has one.
    """
    torch.manual_seed(seed)
    model = system.build_model()
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


def compute_kappa(model: nn.Module) -> dict[str, float]:
    """Compute condition numbers of W + C, medians over the layers: 'whole' for full projections, 'head' for heads."""
    found = list(find_projections(model))
    reports = dict(whole=Report(found), head=Report(found, by_head=True))
    return {name: median(row.kappa for row in report) for name, report in reports.items()}


@torch.no_grad()
def evaluate(system: System, model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return accuracy and mean loss over the targets that are not ignored."""
    model.eval()
    device = next(model.parameters()).device
    logits = torch.cat([system.compute_logits(model, batch.to(device)).cpu() for batch in inputs.split(100)])
    model.train()
    logits, targets = (values[targets != IGNORED] for values in (logits, targets))
    return (logits.argmax(-1) == targets).double().mean().item(), cross_entropy(logits, targets).item()


def train(
    system: System, arm: str, seed: int, build: Callable[..., tuple] = build_initial_model, device: str = 'cpu'
) -> Log:
    """Train a system's model once and evaluate it.

    Args:
        system: the model and the task.
        arm, seed: of the run.
        build: builds the initial model, as :func:`build_initial_model` does.
        device: of the model; examples are drawn on the CPU.

    Raises:
        InputError: if the loss is not finite.
    """
    start = time.time()
    model, corrections, lam = build(system, arm, seed)
    model.to(device)
    kappa = compute_kappa(model)
    keys = median(left for left, _ in measure(model).count_effective_keys(system.tokens))
    optimizer = torch.optim.AdamW(model.parameters(), system.lr, weight_decay=system.weight_decay)
    if corrections and system.weight_decay:
        corrections.keep_fixed(optimizer)
    warm_up = max(1, system.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / system.steps)) / 2)
    )
    held_out = system.draw_held_out()
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for step in range(1, system.steps + 1):
        inputs, targets = (values.to(device) for values in system.draw(system.batch, generator))
        error = cross_entropy(
            system.compute_logits(model, inputs).flatten(0, -2), targets.flatten(), ignore_index=IGNORED
        )
        if not error.isfinite():
            raise InputError(f'{arm}, seed {seed}: the loss is {error.item()} at step {step}')
        optimizer.zero_grad()
        error.backward()
        system.clip_gradients(model)
        optimizer.step()
        schedule.step()
        if 2 * step % system.steps < 2:
            accuracy, loss = evaluate(system, model, *held_out)
            curve.append(accuracy)
    after = compute_kappa(model)
    return Log(
        arm=arm,
        seed=seed,
        settings=system.get_settings(),
        lam=lam,
        keys=keys,
        accuracy=accuracy,
        loss=loss,
        curve=curve,
        kappa={name: (kappa[name], after[name]) for name in kappa},
        seconds=round(time.time() - start, 1),
        torch=torch.__version__,
    )


def get_log_path(folder: Path, seed: int, arm: str) -> Path:
    """Return the path of a run's log."""
    return folder / f'{arm.replace(",", "").replace(" ", "_")}_{seed}.json'


def read_log(folder: Path, seed: int, arm: str, system: System) -> Log | None:
    """Read the log of a run; returns None if the run has not finished.

    Raises:
        InputError: if the file is not a log, or is the log of a run with other settings.
    """
    path = get_log_path(folder, seed, arm)
    if not path.exists():
        return None
    try:
        log = Log(**json.loads(path.read_text(encoding='utf-8')))
        recorded = dict(log.settings, arm=log.arm, seed=log.seed)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f'{path} is not the log of a finished run ({error}); remove it to repeat that run') from error
    wanted = dict(system.get_settings(), arm=arm, seed=seed)
    other = [
        f'{name} {recorded.get(name)}, not {wanted[name]}' for name in wanted if recorded.get(name) != wanted[name]
    ]
    if other:
        raise InputError(f'{path} is the log of another run ({"; ".join(other)}); use --out to choose another folder')
    return log


def write_log(folder: Path, log: Log) -> None:
    """Write the log of a finished run."""
    write(get_log_path(folder, log.seed, log.arm), json.dumps(asdict(log)) + '\n')
