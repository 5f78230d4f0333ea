"""Write the report of an evaluation: an HTML page with COCO metrics, curves, confusions and the worst images."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

import mmdet
import numpy as np
import torch
from mmdet.registry import METRICS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.fileio import get, get_local_path
from mmengine.runner import Runner
from pycocotools.cocoeval import COCOeval
from torch import nn

from ..conditioning import measure
from ..conditioning.correction import describe_conditioning
from ..configs import is_kind_of
from ..data.fitting import list_coco_datasets, list_coco_metrics, list_configured_classes
from ..data.images import decode
from ..data.reading import AnnotationFile
from ..errors import InputError
from ..files import PARTIAL, display_path, format_csv
from .drawing import use_font_for
from .metrics import CheckedCocoMetric, get_average_precision, read_detections
from .outcomes import (
    ERRORS,
    MIN_IOU,
    Outcome,
    Scores,
    count_confusions,
    find_outcomes,
    match_detections,
    measure_scores,
)
from .pages import PAGE, record_data, render_page, require_free
from .plots import (
    CLASSES,
    COLOURS,
    draw_confusion,
    draw_examples,
    draw_precision,
    draw_scores,
    draw_training,
    embed_figure,
    list_confusions,
)

IMAGES = 'images'
KINDS = dict(Boxes='bbox', Masks='segm')
CONFUSIONS = dict(Boxes='confusion.csv', Masks='confusion_masks.csv')
ROLES = dict(Q='queries', K='keys', V='values')
SIZES = ('objects below 32² pixels', 'objects from 32² to 96²', 'objects above 96²')


def describe_stats(limits: Sequence[int]) -> dict[str, str]:
    """Return descriptions of COCO's twelve metrics by pycocotools' names, for its limits of detections."""
    names = {
        'AP': 'IoU 0.50 to 0.95',
        'AP50': 'IoU 0.50',
        'AP75': 'IoU 0.75',
        **dict(zip(('APs', 'APm', 'APl'), SIZES)),
    }
    names |= {f'AR{n}': f'recall with {n} detection{"s" * (n > 1)} per image and class' for n in limits}
    return names | {name: f'AR{limits[-1]} of {size}' for name, size in zip(('ARs', 'ARm', 'ARl'), SIZES)}


@dataclass
class Counts:
    """Counts of a kind of detections at the score threshold that maximises F1.

    Attributes:
        evaluation: detections and objects, matched at IoU 0.50.
        scores: precision, recall and F1 against the threshold.
        outcomes: true and false positives and false negatives by image id.
        matrix: confusion matrix.
    """

    evaluation: COCOeval
    scores: Scores
    outcomes: dict[int, Outcome]
    matrix: np.ndarray

    @classmethod
    def from_detections(cls, annotations: AnnotationFile, detections: Path, summary: COCOeval) -> Counts:
        """Count the detections of a file that was evaluated as ``summary``."""
        evaluation = match_detections(annotations, detections, summary)
        scores = measure_scores(evaluation)
        outcomes = find_outcomes(evaluation, float(scores.thresholds[scores.best]))
        return cls(evaluation, scores, outcomes, count_confusions(evaluation, outcomes))

    def describe(self, names: Sequence[str]) -> dict[str, object]:
        """Return sums over all images, the scores at the best threshold, and the most confused pairs of classes."""
        kinds = ('true_positives', 'false_negatives', 'false_positives')
        sums = {kind: sum(len(getattr(o, kind)) for o in self.outcomes.values()) for kind in kinds}
        best = {key: getattr(self.scores, key)[self.scores.best] for key in ('thresholds', 'precision', 'recall', 'f1')}
        pairs = [(self.matrix[i, j], names[i], names[j]) for i, j in np.argwhere(self.matrix[:-1, :-1]) if i != j]
        return dict(
            sums,
            objects=sums['true_positives'] + sums['false_negatives'],
            errors={kind: sum(len(o.errors[kind]) for o in self.outcomes.values()) for kind in ERRORS},
            threshold=f'{best["thresholds"]:.2f}',
            f1=f'{best["f1"]:.2f}',
            precision='–' if np.isnan(best['precision']) else f'{best["precision"]:.0%}',
            recall='–' if np.isnan(best['recall']) else f'{best["recall"]:.0%}',
            mistaken=sorted(pairs, key=lambda pair: -pair[0])[:10],
        )


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
        annotations: the annotations of the evaluation.
        summaries: the evaluations by kind, 'bbox' and 'segm'; see :class:`CheckedCocoMetric`.
    """

    conditioning: str
    spectra: list[tuple[str, ...]]
    speed: str
    run: dict[str, object]
    weights: dict[str, object]
    curves: dict[str, tuple[list, list]]
    annotations: AnnotationFile
    summaries: dict[str, COCOeval]

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
        metric = next(m for m in runner.test_evaluator.metrics if isinstance(m, CheckedCocoMetric))
        conditioning = describe_conditioning(backbone.state_dict())
        spectra = list_spectra(backbone)
        return cls(conditioning, spectra, speed, run, weights, curves, metric.annotations, metric.summaries)


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


def prepare(folder: Path, cfg: Config) -> None:
    """Check that a report can be written, and make the evaluation write its detections to the folder; changes ``cfg``.

    Args:
        folder: folder of the report: new, empty, or an earlier report's, which stays until the new one is complete.
        cfg: the complete config, with command line options merged.

    Raises:
        InputError: if the folder contains other files, or the config has no COCO evaluation.
    """
    require_free('--report', folder, 'report')
    evaluator = find_coco_evaluator(cfg)
    if not evaluator.get('ann_file') or evaluator.get('format_only') or 'bbox' not in evaluator.get('metric', 'bbox'):
        raise InputError("--report: test_evaluator needs an ann_file, the metric 'bbox' and no format_only. Set them")
    if evaluator.get('iou_thrs') is not None:
        raise InputError("--report: needs COCO's own IoU thresholds. Remove iou_thrs from test_evaluator")
    if not any(list_coco_datasets(cfg.test_dataloader)):
        raise InputError('--report: needs a CheckedCocoDataset in test_dataloader. Use this type')
    evaluator.outfile_prefix = evaluator.get('outfile_prefix') or str(folder / PARTIAL / 'detections')


def find_coco_evaluator(cfg: Config) -> dict:
    """Return the config of the test evaluator that a report shows.

    Raises:
        InputError: if there is none.
    """
    for evaluator in list_coco_metrics(cfg, 'test'):
        if is_kind_of(evaluator, METRICS, CheckedCocoMetric):
            return evaluator
        raise InputError(f'--report: test_evaluator.type is {evaluator["type"]}. Set it to FastCocoMetric')
    raise InputError('--report: needs a FastCocoMetric in test_evaluator. Add one')


def format_metric(value: float) -> str:
    """Return a metric as text, or a dash for pycocotools' -1, which means that there are no objects."""
    return f'{value:.3f}' if value > -1 else '–'


def write(folder: Path, cfg: Config, checkpoint: str, command: list[str], tested: TestResults) -> None:
    """Write the report of an evaluation for which :func:`prepare` prepared the config.

    Args:
        folder: the folder to write to.
        cfg: the complete config.
        checkpoint: name of the evaluated checkpoint.
        command: words of the command line.
        tested: results of the test.
    """
    evaluator = find_coco_evaluator(cfg)
    dataset = next(list_coco_datasets(cfg.test_dataloader))
    summaries = {name: tested.summaries[kind] for name, kind in KINDS.items() if kind in tested.summaries}
    with get_local_path(evaluator.ann_file, backend_args=evaluator.get('backend_args')) as path:
        record_data(folder, Path(path), list_configured_classes(dataset), tested.weights)
    files = {name: Path(f'{evaluator.outfile_prefix}.{KINDS[name]}.json') for name in summaries}
    counts = {name: Counts.from_detections(tested.annotations, files[name], summaries[name]) for name in summaries}
    boxes = counts['Boxes'].evaluation
    coco = boxes.cocoGt
    names = [coco.cats[category]['name'] for category in boxes.params.catIds]
    objects = [a for a in coco.anns.values() if a['category_id'] in boxes.params.catIds and not a['iscrowd']]
    of_class = Counter(annotation['category_id'] for annotation in objects)
    of_size = [sum(low <= a['area'] <= high for a in objects) for low, high in summaries['Boxes'].params.areaRng]
    images = os.path.join(dataset.get('data_root') or '', dataset.data_prefix.img)
    matrix = counts['Boxes'].matrix

    (folder / IMAGES).mkdir()
    for name, counted in counts.items():
        (folder / CONFUSIONS[name]).write_text(format_csv(list_confusions(counted.matrix, names)), 'utf-8')
    with use_font_for(names):
        masks = (
            [result['segmentation'] for result in read_detections(files['Masks'], 'segm')] if 'Masks' in files else None
        )
        examples = draw_examples(
            folder / IMAGES,
            lambda name: decode(get(os.path.join(images, name)))[..., ::-1],
            boxes,
            counts['Boxes'].outcomes,
            masks,
        )
        plots = dict(
            curves={name: draw_precision(summary, name) for name, summary in summaries.items()},
            thresholds={name: draw_scores(counted.scores, name) for name, counted in counts.items()},
            confusions={name: draw_confusion(counted.matrix, names) for name, counted in counts.items()},
        )
        plots = {key: {name: embed_figure(figure) for name, figure in found.items()} for key, found in plots.items()}
    # Outside of the context, which disables the mathtext of logarithmic axes.
    plots['training'] = {i: embed_figure(figure) for i, figure in enumerate(draw_training(tested.curves))}
    device = torch.cuda.get_device_name() if get_device() == 'cuda' else 'CPU'
    page = render_page(
        'report',
        title=Path(cfg.filename).stem,
        checkpoint=display_path(checkpoint),
        counts={name: counted.describe(names) for name, counted in counts.items()},
        images=len(coco.imgs),
        detections=len(boxes.cocoDt.anns),
        date=time.strftime('%Y-%m-%d %H:%M'),
        stats={name: [format_metric(value) for value in summary.stats] for name, summary in summaries.items()},
        stat_names=describe_stats(summaries['Boxes'].params.maxDets),
        stat_objects=[of_size[i] for i in (0, 0, 0, 1, 2, 3) * 2],
        min_iou=MIN_IOU,
        plots=plots,
        error_kinds=ERRORS,
        confusions=CONFUSIONS,
        drawn_classes=CLASSES,
        classes=[
            (
                name,
                *(format_metric(get_average_precision(summary, i)) for summary in summaries.values()),
                format_metric(get_average_precision(summaries['Boxes'], i, MIN_IOU)),
                of_class[category],
                matrix[i, i],
                matrix[:, i].sum() - matrix[i, i],
            )
            for i, (name, category) in enumerate(zip(names, boxes.params.catIds))
        ],
        colours=COLOURS,
        examples=examples,
        tested=tested,
        command=' '.join(map(quote_word, command)),
        data=display_path(evaluator.ann_file),
        folder=display_path(images),
        versions=f'torch {torch.__version__}, mmdet {mmdet.__version__}, spec_mmdet {version("spec_mmdet")}',
        device=device,
        config=display_path(cfg.filename),
        config_text=cfg.pretty_text,
    )
    (folder / PAGE).write_text(page, 'utf-8')


def quote_word(word: str) -> str:
    """Quote a word of a command line for a shell, with paths relative to the working directory."""
    return shlex.quote(word.replace(f'{os.getcwd()}{os.sep}', ''))
