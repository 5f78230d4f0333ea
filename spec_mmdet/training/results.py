"""Write curves, a table and pictures of a training to its work directory, and read them."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import cv2
import mmengine
import numpy as np
import torch
from matplotlib.figure import Figure
from mmdet.registry import HOOKS
from mmdet.structures import DetDataSample
from mmengine.dist import master_only
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compat import exchanges_channels
from ..conditioning.correction import describe_conditioning
from ..data.images import decode
from ..data.tasks import list_annotation_files
from ..errors import InputError
from ..evaluation.drawing import Mark, draw, tile_pictures, use_font_for
from ..evaluation.plots import add_legend
from ..evaluation.tasks import LABELS, PREFIXES, find_task
from ..files import compute_digest, format_csv, write
from ..models.products import CHOSEN
from .hooks import CONDITIONING, MEDIANS, find_learning_rate
from .saving import unwrap_model

TABLE, CURVES, RUN = 'results.csv', 'results.png', 'run.json'
BATCHES = 3  # training batches to draw
IMAGES = 8  # images to draw of the validation, and maximum of a batch
MIN_SCORE = 0.3
TILE = 320  # longer side of a drawn image in pixels


def find_commit(path: Path) -> str | None:
    """Return the git commit of a file or folder, followed by -dirty if there are changes.

    The result is None if git does not track it, for instance in an environment within a repository.
    """
    git = ['git', '-C', str(path if path.is_dir() else path.parent)]
    try:
        subprocess.run([*git, 'ls-files', '--error-unmatch', str(path)], check=True, capture_output=True)
        describe = ['describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
        return subprocess.run([*git, *describe], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_run(runner: Runner) -> dict:
    """Return a run's metadata: command, commits, seed, config, conditioning, data and versions."""
    backbone = getattr(unwrap_model(runner), 'backbone', None)
    return dict(
        command=shlex.join(['spec-mmdet', *sys.argv[1:]]) if Path(sys.argv[0]).name in ('spec-mmdet', '__main__.py')
        else shlex.join(sys.argv),
        commit=find_commit(Path(__file__)),
        commit_here=find_commit(Path.cwd()),
        seed=runner.seed,
        config=str(runner.cfg.filename),
        conditioning=describe_conditioning(backbone.state_dict()) if backbone is not None else 'None',
        started=runner.timestamp,
        products=dict(CHOSEN),
        data={
            loop: {str(path): compute_digest(path) for path in list_annotation_files(runner.cfg, loop)}
            for loop in ('train', 'val')
        },
        versions=dict(torch=str(torch.__version__), mmengine=mmengine.__version__, spec_mmdet=version('spec_mmdet')),
    )  # fmt: skip


@cache  # prints once, although a training reads the file after each validation
def report_truncation(path: Path) -> None:
    print(f'{path}: skipped the last line, which is truncated', file=sys.stderr)


def read_json_lines(path: Path) -> list[dict]:
    """Read a file with one JSON object per line; skip a truncated last line, which a killed run leaves.

    Raises:
        InputError: if any other line is not JSON.
    """
    records, lines = [], path.read_text(errors='replace').splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f'{path}: line {number} is not JSON ({error}). Remove the line') from error
            report_truncation(path)
    return records


def read_scalars(work_dir: Path) -> list[dict]:
    """Read the scalars that a training logged, including those before it was resumed."""
    records: list[dict] = []
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        later = read_json_lines(path)
        first = min((entry['iter'] for entry in later if 'loss' in entry), default=float('inf'))
        # Iterations after the resumed checkpoint were trained again.
        again = next((i for i, entry in enumerate(records) if entry.get('iter', 0) >= first), len(records))
        records = records[:again] + later
    return records


def read_facts(work_dir: Path) -> dict:
    """Read what a training recorded about itself (:func:`describe_run`); {} without a record."""
    path = work_dir / RUN
    return json.loads(path.read_text()) if path.is_file() else {}


def is_of_training(run: dict, work_dir: Path) -> bool:
    """Return whether the metadata of a checkpoint are those of the training in a folder, as far as both are known."""
    facts = read_facts(work_dir)
    return bool(run and facts) and all(facts.get(key) == run.get(key) for key in ('seed', 'data'))


def read_curves(work_dir: Path) -> dict[str, tuple[list, list]]:
    """Read a training's learning curves: loss, metrics by their labels ('box AP'), median condition numbers.

    Returns:
        For each curve's name its iterations and values.
    """
    curves: dict[str, tuple[list, list]] = {}

    def add(name: str, iteration: float, value: float) -> None:
        xs, ys = curves.setdefault(name, ([], []))
        xs.append(iteration)
        ys.append(value)

    last = 0
    for entry in read_scalars(work_dir):
        if 'loss' in entry:
            last = entry['iter']
            add('loss', last, entry['loss'])
        for key, value in select_metrics(entry).items():
            if key in LABELS or not key.startswith(PREFIXES):
                add(LABELS.get(key, key), last, value)
        for name in MEDIANS:
            if f'{CONDITIONING}/{name}' in entry:
                add(name, entry['step'], entry[f'{CONDITIONING}/{name}'])
    return curves


def select_metrics(entry: dict) -> dict[str, float]:
    return {key: value for key, value in entry.items() if '/' in key and not key.startswith('conditioning/')}


def group_by_epoch(records: Sequence[dict]) -> Iterator[dict]:
    """Yield a row for each validation: mean losses since the previous one, the learning rate, and metrics.

    AP of sizes that the data lacks, -1 in MMDetection, is ''.
    """
    since: list[dict] = []
    for entry in records:
        if 'loss' in entry:
            since.append(entry)
        elif select_metrics(entry) and since:
            losses = {key: float(np.mean([e[key] for e in since if key in e])) for key in since[-1] if 'loss' in key}
            rate = {key: since[-1][key] for key in ('lr',) if key in since[-1]}  # absent with several optimisers
            metrics = {key: value if value != -1 else '' for key, value in select_metrics(entry).items()}
            yield dict(epoch=entry['step'], iter=since[-1]['iter'], **rate, **losses, **metrics)
            since = []


def choose_marker(points: Sequence) -> str | None:
    """Return the marker of a curve: dots if it has few points, because a single one draws no line."""
    return 'o' if len(points) < 20 else None


def draw_curves(records: Sequence[dict], title: str) -> Figure:
    """Plot losses, metrics, learning rate and condition numbers against the iteration."""
    train = [entry for entry in records if 'loss' in entry]
    conditions = [entry for entry in records if f'{CONDITIONING}/seconds' in entry]
    rows = list(group_by_epoch(records))
    figure = Figure(figsize=(12, 7), layout='constrained')
    figure.suptitle(title)
    losses, scores, rate, kappa = figure.subplots(2, 2).flat
    for name in dict.fromkeys(key for entry in train for key in entry if re.match('loss', key)):
        own = [entry for entry in train if name in entry]
        label = name.removeprefix('loss_') if name != 'loss' else 'all'
        style = dict(linewidth=2 if name == 'loss' else 1, marker=choose_marker(own))
        losses.plot([e['iter'] for e in own], [e[name] for e in own], label=label, **style)
    losses.set(title='loss', yscale='log')
    measured = dict.fromkeys(key for row in rows for key in row if key in LABELS or re.search('_mAP(_50)?$', key))
    colours = {name: f'C{i}' for i, name in enumerate(dict.fromkeys(name.removesuffix('_50') for name in measured))}
    for name in measured:
        own, base = [row for row in rows if row.get(name, '') != ''], name.removesuffix('_50')
        style = dict(linestyle='-' if name == base else '--', color=colours[base], marker='o')
        label = LABELS.get(base, base) + '50' * (name != base)
        scores.plot([row['iter'] for row in own], [row[name] for row in own], label=label, **style)
    percent = any(line.get_ydata().max(initial=0) > 1 for line in scores.lines)
    scores.set(title='metrics on the validation images', ylim=(0, 100 if percent else 1))
    rates = [entry.get('lr', float('nan')) for entry in train]
    rate.plot([entry['iter'] for entry in train], rates, marker=choose_marker(train))
    rate.set(title='learning rate, highest of all parameters', ylim=(0, None))
    for name in MEDIANS:
        values = [entry.get(f'{CONDITIONING}/{name}', float('nan')) for entry in conditions]
        kappa.plot([e['step'] for e in conditions], values, marker=choose_marker(values), label=name.replace('_', ' '))
    kappa.set(title='condition numbers, smallest singular value (medians)', yscale='log')
    for axis in (losses, scores, rate, kappa):
        axis.set_xlabel('iteration')
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            add_legend(axis)
        else:
            axis.text(0.5, 0.5, '' if axis.lines else 'none yet', ha='center', transform=axis.transAxes)
    return figure


def draw_tile(image: np.ndarray, marks: Sequence[Mark], title: str) -> np.ndarray:
    """Draw marks on an image, RGB."""
    return draw(image, marks, TILE / max(image.shape[:2]), title)


@HOOKS.register_module()
class ResultsHook(Hook):
    """Hook that writes metadata, pictures, tables and curves to the work directory.

    * ``run.json``: command, commit, seed, conditioning and kernels; also in checkpoints, as meta.run.
    * ``train_batch_1.jpg`` etc.: the first training images with their labels, after augmentation.
    * ``val_epoch_1.jpg`` etc.: the first validation images with truth and predictions.
    * ``results.csv`` and ``results.png`` after each validation: losses, AP, learning rate and condition numbers.
    """

    priority = 'VERY_LOW'  # after MMEngine's logger has written the metrics

    def __init__(self) -> None:
        self.facts: dict = {}
        self.tiles: list[np.ndarray] = []
        self.drawn = -1  # iteration of the last curves

    @master_only
    def before_train(self, runner: Runner) -> None:
        """Write the run's metadata, with digests of the annotation files."""
        self.facts = describe_run(runner)
        self._write(runner, RUN, json.dumps(self.facts, indent=1).encode())
        self.started = runner.iter
        self.bgr = exchanges_channels(unwrap_model(runner).data_preprocessor)

    @master_only
    def _write(self, runner: Runner, name: str, content: bytes) -> None:
        write(Path(runner.work_dir, name), content)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Store the run's metadata in the checkpoint."""
        checkpoint['meta']['run'] = self.facts

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None) -> None:
        """Log the highest learning rate, as the terminal does; MMEngine logs that of the first group of parameters."""
        runner.message_hub.update_scalar('train/lr', find_learning_rate(runner))

    @master_only
    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Draw the first batches."""
        number = runner.iter - self.started + 1
        if number > BATCHES or self.started:
            return
        classes, task = runner.train_dataloader.dataset.metainfo['classes'], find_task(runner.cfg)
        tiles = []
        with use_font_for(classes):
            for image, sample in list(zip(data_batch['inputs'], data_batch['data_samples']))[:IMAGES]:
                pixels = torch.as_tensor(image).cpu().numpy().transpose(1, 2, 0)
                pixels = pixels[..., ::-1] if self.bgr else pixels
                tiles.append(draw_tile(pixels, task.mark_truth(sample, classes), Path(sample.img_path).name))
        self._write_picture(runner, f'train_batch_{number}.jpg', tiles)

    @master_only
    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[DetDataSample] | None = None
    ) -> None:
        """Draw predictions and truth of the first images."""
        classes, task = runner.val_dataloader.dataset.metainfo['classes'], find_task(runner.cfg)
        wanted = (outputs or ())[: IMAGES - len(self.tiles)]
        with use_font_for(classes if wanted else ()):
            for sample in wanted:
                image, name = decode(get(sample.img_path))[..., ::-1], Path(sample.img_path).name
                marks = task.mark_predictions(sample, classes, MIN_SCORE)
                pair = [draw_tile(image, marks, f'{name}: predictions')]
                if marks := task.mark_truth(sample, classes):
                    pair.insert(0, draw_tile(image, marks, f'{name}: truth'))
                self.tiles.append(tile_pictures(pair, 2, 4))

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Write pictures, table and curves."""
        place = f'epoch_{runner.epoch}' if runner.epoch else f'iter_{runner.iter}'
        self._write_picture(runner, f'val_{place}.jpg', self.tiles, 2)
        self.tiles = []
        self._write_curves(runner)

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Write the curves up to the last iteration."""
        if self.drawn != runner.iter:
            self._write_curves(runner)

    def _write_curves(self, runner: Runner) -> None:
        self.drawn = runner.iter
        records = read_scalars(Path(runner.work_dir))
        if rows := list(group_by_epoch(records)):
            self._write(runner, TABLE, format_csv(rows).encode())
        buffer = io.BytesIO()
        draw_curves(records, Path(runner.work_dir).name).savefig(buffer, dpi=100)
        self._write(runner, CURVES, buffer.getvalue())

    def _write_picture(self, runner: Runner, name: str, tiles: Sequence[np.ndarray], columns: int = 4) -> None:
        if tiles:
            self._write(runner, name, cv2.imencode('.jpg', tile_pictures(tiles, columns)[..., ::-1])[1].tobytes())
