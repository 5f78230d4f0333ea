"""Write the report of an evaluation, an HTML page: the task's results, the training, the conditioning, and details."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import mmdet
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from torch import nn

from ..conditioning import measure
from ..conditioning.correction import describe_conditioning
from ..errors import InputError
from ..files import display_path
from .pages import PAGE, render_page, require_free
from .plots import draw_training, embed_figure
from .tasks import find_task

ROLES = dict(Q='queries', K='keys', V='values')


@dataclass
class TestResults:
    """Results of a test, without the detections.

    Attributes:
        conditioning: the backbone's, as configs write it.
        spectra: a row for each of queries, keys and values: its name, median and maximum of kappa(W) over the layers,
            and of kappa(W + C) if there is a C; empty for a backbone without known attention.
        speed: images per second, including loading.
        run: metadata of the checkpoint's training.
        weights: state of the checkpoint's weights; see ``describe_state``.
        curves: the training's learning curves by name, iterations and values; empty if they are unknown.
        metric: the task's metric, which keeps its results.
    """

    conditioning: str
    spectra: list[tuple[str, ...]]
    speed: str
    run: dict[str, object]
    weights: dict[str, object]
    curves: dict[str, tuple[list, list]]
    metric: BaseMetric

    @classmethod
    def from_runner(
        cls, runner: Runner, run: dict[str, object], weights: dict[str, object], curves: dict[str, tuple[list, list]]
    ) -> TestResults:
        """Collect the results of a runner after its test loop."""
        model = runner.model.module if hasattr(runner.model, 'module') else runner.model
        backbone = getattr(model, 'backbone', None) or nn.Identity()
        seconds = runner.message_hub.log_scalars.get('test/time')
        batch = runner.test_dataloader.batch_sampler.batch_size
        speed = f'{batch / seconds.mean():.1f} images per second, batch size {batch}' if seconds else 'not measured'
        metric = next(m for m in runner.test_evaluator.metrics if isinstance(m, find_task(runner.cfg).Metric))
        conditioning = describe_conditioning(backbone.state_dict())
        spectra = list_spectra(backbone)
        return cls(conditioning, spectra, speed, run, weights, curves, metric)


def list_spectra(backbone: nn.Module) -> list[tuple[str, ...]]:
    """List the condition numbers of a backbone, as in :class:`TestResults`."""
    try:
        measured = list(measure(backbone))
    except InputError:  # the backbone has no known attention
        return []
    rows = []
    for role, name in ROLES.items():
        of_role = [row for row in measured if row.role[0] == role]
        columns = [[row.kappa for row in of_role], [k for row in of_role if (k := row.conditioned_kappa) is not None]]
        values = (function(kappas) if kappas else None for kappas in columns for function in (median, max))
        if of_role:
            rows.append((name, *('–' if value is None else format_kappa(value) for value in values)))
    return rows


def format_kappa(kappa: float) -> str:
    """Return a condition number as text."""
    return f'{kappa:,.0f}' if kappa >= 100 else f'{kappa:.3g}'


def prepare(folder: Path, cfg: Config) -> dict | list[dict]:
    """Check that a report can be written, and make the evaluation write its results to the folder; changes ``cfg``.

    Args:
        folder: folder of the report: new, empty, or an earlier report's, which stays until the new one is complete.
        cfg: the complete config, with command line options merged.

    Returns:
        The config's ``test_evaluator``, for the other processes.

    Raises:
        InputError: if the folder contains other files, or the config's evaluation cannot be reported.
    """
    require_free('--report', folder, 'report')
    find_task(cfg).prepare_report(folder, cfg)
    return cfg.test_evaluator


def write(folder: Path, cfg: Config, checkpoint: str, command: list[str], tested: TestResults) -> None:
    """Write the report of an evaluation for which :func:`prepare` prepared the config.

    Args:
        folder: the folder to write to.
        cfg: the complete config.
        checkpoint: name of the evaluated checkpoint.
        command: words of the command line.
        tested: results of the test.
    """
    task = find_task(cfg)
    values = task.describe_report(folder, cfg, tested.metric, tested.weights)
    # Mathtext, which use_font_for disables, is needed by logarithmic axes.
    curves = draw_training(tested.curves, task.LABELS.values())
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else 'CPU'
    page = render_page(
        'report',
        task.__name__.rpartition('.')[2],
        title=Path(cfg.filename).stem,
        checkpoint=display_path(checkpoint),
        date=time.strftime('%Y-%m-%d %H:%M'),
        training={title: embed_figure(figure) for title, figure in curves.items()},
        tested=tested,
        command=' '.join(map(quote_word, command)),
        versions=f'torch {torch.__version__}, mmdet {mmdet.__version__}, spec_mmdet {version("spec_mmdet")}',
        device=device,
        config=display_path(cfg.filename),
        config_text=cfg.pretty_text,
        **values,
    )
    (folder / PAGE).write_text(page, 'utf-8')


def quote_word(word: str) -> str:
    """Quote a word of a command line for a shell, with paths relative to the working directory."""
    return shlex.quote(word.replace(f'{os.getcwd()}{os.sep}', ''))
