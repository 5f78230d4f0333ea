"""An evaluation that people can look at: an HTML page with COCO's figures, curves, confusions and the worst images."""

from __future__ import annotations

import io
import os
import shlex
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import mmdet
import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import get, get_local_path
from mmengine.runner import Runner
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..conditioning import measure
from ..conditioning.correction import describe_conditioning
from ..data.fitting import coco_datasets, coco_metrics, configured_classes
from ..data.images import decode
from ..data.reading import AnnotationFile
from ..errors import InputError
from ..files import PARTIAL, display_path
from .drawing import names_drawn
from .figures import COLOURS, draw_confusion, draw_precision, draw_scores, draw_worst, embedded_figure
from .metrics import Evaluation, read_detections
from .outcomes import ERRORS, MIN_IOU, Outcome, confusion_matrix, outcomes, scores_of
from .pages import PAGE, page_of, record_data, require_free

# COCO's twelve numbers, as pycocotools has them, and what they are.
STATS = {
    'AP': 'IoU 0.50 to 0.95',
    'AP50': 'IoU 0.50',
    'AP75': 'IoU 0.75',
    'APs': 'objects below 32² pixels',
    'APm': 'objects from 32² to 96²',
    'APl': 'objects above 96²',
    'AR1': 'recall with 1 detection an image',
    'AR10': 'with 10',
    'AR100': 'with 100',
    'ARs': 'with 100, objects below 32²',
    'ARm': 'objects from 32² to 96²',
    'ARl': 'objects above 96²',
}
IMAGES = 'images'
ROLES = dict(Q='queries', K='keys', V='values')


@dataclass
class TestResults:
    """What a report tells of the detector, beside what it found.

    Attributes:
        conditioning: in the form that configs use.
        spectra: for the queries', keys' and values' projections, over the layers: median and greatest kappa(W), and
            kappa(W + C) where there is a C; empty where no attention is known.
        speed: images a second, loading and all.
        run: what the checkpoint's training says of itself.
    """

    conditioning: str
    spectra: list[tuple[str, ...]]
    speed: str
    run: dict[str, object]

    @classmethod
    def of(cls, runner: Runner, run: dict[str, object]) -> TestResults:
        """Of a runner after its test."""
        model = runner.model.module if hasattr(runner.model, 'module') else runner.model
        backbone = getattr(model, 'backbone', None) or nn.Identity()
        seconds = runner.message_hub.log_scalars.get('test/time')
        batch = runner.test_dataloader.batch_sampler.batch_size
        speed = f'{batch / seconds.mean():.1f} images a second, in batches of {batch}' if seconds else 'not measured'
        return cls(describe_conditioning(backbone.state_dict()), spectra_of(backbone), speed, run)


def spectra_of(backbone: nn.Module) -> list[tuple[str, ...]]:
    """The rows of :class:`TestResults`."""
    try:
        measured = list(measure(backbone))
    except InputError:  # of a backbone without attention, or one that is not known
        return []
    rows = []
    for role, name in ROLES.items():
        own = [row for row in measured if row.role[0] == role]
        columns = [[row.kappa for row in own], [k for row in own if (k := row.conditioned_kappa) is not None]]
        if own:
            rows.append((name, *(rounded(f(kappas)) if kappas else '–' for kappas in columns for f in (median, max))))
    return rows


def rounded(kappa: float) -> str:
    """A condition number to read."""
    return f'{kappa:,.0f}' if kappa >= 100 else f'{kappa:.3g}'


def prepare(folder: Path, cfg: Config) -> None:
    """Check that a report can be written and have the evaluation leave its detections beside it; changes ``cfg``.

    Args:
        folder: where the report is to be: new, empty, or an earlier report's, which stays until the new one is whole.
        cfg: the whole config, command line options merged.

    Raises:
        InputError: if the folder holds anything else, or the config has no COCO evaluation to report on.
    """
    require_free('--report', folder, 'report')
    evaluator = coco_evaluator(cfg)
    if not evaluator.get('ann_file') or evaluator.get('format_only') or 'bbox' not in evaluator.get('metric', 'bbox'):
        raise InputError("--report: needs a test_evaluator that has an ann_file, the metric 'bbox' and no format_only")
    if not any(coco_datasets(cfg.test_dataloader)):
        raise InputError('--report: needs a CocoDataset in test_dataloader')
    evaluator.outfile_prefix = evaluator.get('outfile_prefix') or str(folder / PARTIAL / 'detections')


def coco_evaluator(cfg: Config) -> dict:
    """The test evaluator whose metric is COCO's; an InputError where there is none."""
    for evaluator in coco_metrics(cfg, 'test'):
        return evaluator
    raise InputError('--report: needs a CocoMetric in test_evaluator')


def evaluate(coco: COCO, detections: Path, kind: str, categories: list[int | str]) -> COCOeval:
    """Evaluate detections by pycocotools' own rules; the ids in the result are numbers (see :class:`Evaluation`).

    Args:
        coco: the truth.
        detections: a JSON file in COCO's format for results.
        kind: 'bbox' or 'segm'.
        categories: ids of those to evaluate.
    """
    results = read_detections(detections, kind)
    if results:
        found = coco.loadRes(results)
    else:  # loadRes cannot tell of what kind no results are
        found = COCO()
        found.dataset = dict(coco.dataset, annotations=[])
        found.createIndex()
    evaluation = Evaluation(coco, found, kind)
    evaluation.params.catIds = categories
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def average_precision(evaluation: COCOeval, category: int, iou: slice = slice(None)) -> float:
    """A category's AP, by its place among the evaluated; -1 where it has no objects."""
    precision = evaluation.eval['precision'][iou, :, category, 0, -1]
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else -1.0


def printed(value: float) -> str:
    """A figure as it is printed; a dash for pycocotools' -1, which says that there is nothing to measure."""
    return f'{value:.3f}' if value > -1 else '–'


def write(folder: Path, cfg: Config, checkpoint: str, command: list[str], tested: TestResults) -> None:
    """Write the report of an evaluation for which :func:`prepare` prepared the config.

    Args:
        folder: where to.
        cfg: the whole config.
        checkpoint: the name of the evaluated one.
        command: the command line's words.
        tested: of the detector.
    """
    evaluator = coco_evaluator(cfg)
    dataset = next(coco_datasets(cfg.test_dataloader))
    metrics = evaluator.get('metric', 'bbox')
    kinds = {'Boxes': 'bbox', 'Masks': 'segm'} if 'segm' in metrics else {'Boxes': 'bbox'}
    with redirect_stdout(io.StringIO()):
        with get_local_path(evaluator.ann_file, backend_args=evaluator.get('backend_args')) as path:
            coco = AnnotationFile(str(path))
            record_data(folder, Path(path), configured_classes(dataset))
        categories = coco.getCatIds(catNms=configured_classes(dataset))
        evaluations = {
            name: evaluate(coco, Path(f'{evaluator.outfile_prefix}.{kind}.json'), kind, categories)
            for name, kind in kinds.items()
        }
    boxes = evaluations['Boxes']
    scores = scores_of(boxes)
    least = float(scores.thresholds[scores.best])
    outcome_of = outcomes(boxes, least)
    coco = boxes.cocoGt
    names = [coco.cats[category]['name'] for category in boxes.params.catIds]
    matrix = confusion_matrix(boxes, outcome_of)
    images = os.path.join(dataset.get('data_root') or '', dataset.data_prefix.img)

    (folder / IMAGES).mkdir()
    with names_drawn(names):
        worst = draw_worst(
            folder / IMAGES, lambda name: decode(get(os.path.join(images, name)))[..., ::-1], evaluations, outcome_of
        )
        curves = [embedded_figure(draw_precision(evaluation, name)) for name, evaluation in evaluations.items()]
        confusion, thresholds = embedded_figure(draw_confusion(matrix, names)), embedded_figure(draw_scores(scores))
    mistaken = [(matrix[i, j], names[i], names[j]) for i, j in np.argwhere(matrix[:-1, :-1]) if i != j]
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else 'CPU'
    page = page_of(
        'report',
        title=Path(cfg.filename).stem,
        checkpoint=display_path(checkpoint),
        **totals(outcome_of),
        images=len(coco.imgs),
        detections=len(boxes.cocoDt.anns),
        date=time.strftime('%Y-%m-%d %H:%M'),
        stats={name: [printed(value) for value in evaluation.stats] for name, evaluation in evaluations.items()},
        stat_names=STATS,
        least=f'{least:.2f}',
        best_f1=f'{scores.f1[scores.best]:.2f}',
        precision=f'{scores.precision[scores.best]:.0%}',
        recall=f'{scores.recall[scores.best]:.0%}',
        min_iou=MIN_IOU,
        thresholds=thresholds,
        error_kinds=ERRORS,
        curves=curves,
        confusion=confusion,
        mistaken=sorted(mistaken, key=lambda m: -m[0])[:10],
        classes=[
            (
                name,
                *(printed(average_precision(evaluation, i)) for evaluation in evaluations.values()),
                printed(average_precision(boxes, i, slice(0, 1))),
                matrix[i].sum(),
                matrix[i, i],
                matrix[:, i].sum() - matrix[i, i],
            )
            for i, name in enumerate(names)
        ],
        colours=COLOURS,
        worst=worst,
        tested=tested,
        command=' '.join(map(word_shown, command)),
        data=display_path(evaluator.ann_file),
        folder=display_path(images),
        versions=f'torch {torch.__version__}, mmdet {mmdet.__version__}, spec_mmdet {version("spec_mmdet")}',
        device=device,
        config=display_path(cfg.filename),
        config_text=cfg.pretty_text,
    )
    (folder / PAGE).write_text(page, 'utf-8')


def totals(outcome_of: dict[int, Outcome]) -> dict[str, object]:
    """What became of all objects and detections together."""
    found, missed, false = (sum(len(getattr(o, k)) for o in outcome_of.values()) for k in ('found', 'missed', 'false'))
    errors = {kind: sum(len(o.errors[kind]) for o in outcome_of.values()) for kind in ERRORS}
    return dict(found=found, objects=found + missed, false_positives=false, errors=errors)


def word_shown(word: str) -> str:
    """A word of a command line, quoted where a shell needs it, the paths below here without it."""
    return shlex.quote(word.replace(f'{os.getcwd()}{os.sep}', ''))
