"""The evaluation of detection with COCO metrics: labels, drawings, results and the report (see :mod:`tasks`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmdet.registry import METRICS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import encode_mask_results, mask2bbox
from mmengine.config import Config
from mmengine.fileio import get, get_local_path
from mmengine.structures import InstanceData
from pycocotools.cocoeval import COCOeval

from ..configs import is_kind_of
from ..data.fitting import list_coco_datasets, list_coco_metrics, list_configured_classes, list_kinds
from ..data.images import decode
from ..data.reading import AnnotationFile
from ..errors import InputError
from ..files import PARTIAL, display_path, format_csv
from .drawing import Mark, convert_to_marks, use_font_for
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
from .pages import record_data
from .plots import (
    CLASSES,
    COLOURS,
    draw_confusion,
    draw_examples,
    draw_precision,
    draw_scores,
    embed_figure,
    list_confusions,
)

Metric = CheckedCocoMetric
LABELS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
IMAGES = 'images'
ENVELOPE = '[', ']'  # around the results of predict
KINDS = dict(Boxes='bbox', Masks='segm')
CONFUSIONS = dict(Boxes='confusion.csv', Masks='confusion_masks.csv')
SIZES = ('objects below 32² pixels', 'objects from 32² to 96²', 'objects above 96²')


def mark_truth(sample: DetDataSample, classes: Sequence[str]) -> list[Mark]:
    """Return the marks of an image's objects, in pixels of the image that their coordinates belong to."""
    return convert_to_marks(sample.gt_instances, classes) if 'gt_instances' in sample else []


def mark_predictions(sample: DetDataSample, classes: Sequence[str], score: float) -> list[Mark]:
    """Return the marks of an image's detections from a score threshold on."""
    return convert_to_marks(state_boxes(sample.pred_instances.cpu()), classes, score)


def state_boxes(instances: InstanceData) -> InstanceData:
    """Replace the boxes by those of the masks where a detector predicts none (SOLO: all are 0); returns instances."""
    if 'masks' in instances and not instances.bboxes.any():
        instances.bboxes = mask2bbox(instances.masks)
    return instances


def list_categories(cfg: Config, classes: Sequence[str]) -> list[dict]:
    """List the categories of the results; ids are labels + 1."""
    return [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]


def list_results(
    sample: DetDataSample, classes: Sequence[str], score: float, image_id: int, folder: Path, stem: Path
) -> Iterator[dict]:
    """Yield the detections of an image from a score threshold on, in COCO's results format.

    Args:
        sample: the image's sample with predictions.
        classes: names of the labels; unused.
        score: the score threshold.
        image_id: the image's id in the results.
        folder, stem: where the image's files belong, and their name without a suffix; unused.
    """
    found = state_boxes(sample.pred_instances.cpu())
    found = found[found.scores >= score]
    masks = encode_mask_results(found.masks) if 'masks' in found else None
    fields = (found[key].tolist() for key in ('labels', 'scores', 'bboxes'))
    for i, (label, value, (x0, y0, x1, y1)) in enumerate(zip(*fields)):
        result = dict(image_id=image_id, category_id=label + 1, bbox=[x0, y0, x1 - x0, y1 - y0], score=value)
        if masks is not None:
            result['segmentation'] = dict(masks[i], counts=masks[i]['counts'].decode())
        yield result


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


def prepare_report(folder: Path, cfg: Config) -> None:
    """Check that a config's evaluation can be reported, and make it write detections to the folder; changes ``cfg``.

    Raises:
        InputError: if the config has no COCO evaluation.
    """
    evaluator = find_coco_evaluator(cfg)
    kinds = {*list_kinds(evaluator)} & {*KINDS.values()}
    if not evaluator.get('ann_file') or evaluator.get('format_only') or not kinds:
        raise InputError("--report: test_evaluator needs an ann_file, the metric 'bbox' or 'segm', and no format_only. "
                         'Set them')  # fmt: skip
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


def describe_report(
    folder: Path, cfg: Config, metric: CheckedCocoMetric, weights: dict[str, object]
) -> dict[str, object]:
    """Return the values of the report's template detection.html, and write the report's pictures and tables.

    Args:
        folder: the report's folder.
        cfg: the complete config, after :func:`prepare_report`.
        metric: the metric after its evaluation.
        weights: state of the evaluated weights.
    """
    evaluator = find_coco_evaluator(cfg)
    dataset = next(list_coco_datasets(cfg.test_dataloader))
    summaries = {name: metric.summaries[kind] for name, kind in KINDS.items() if kind in metric.summaries}
    with get_local_path(evaluator.ann_file, backend_args=evaluator.get('backend_args')) as path:
        record_data(folder, Path(path), list_configured_classes(dataset), weights)
    files = {name: Path(f'{evaluator.outfile_prefix}.{KINDS[name]}.json') for name in summaries}
    if 'Boxes' not in summaries:  # all are 0 in this file, which compare would read
        Path(f'{evaluator.outfile_prefix}.bbox.json').unlink(missing_ok=True)
    counts = {name: Counts.from_detections(metric.annotations, files[name], summaries[name]) for name in summaries}
    first = next(iter(counts))  # masks, if the detector has no boxes
    main = counts[first].evaluation
    coco = main.cocoGt
    names = [coco.cats[category]['name'] for category in main.params.catIds]
    objects = [a for a in coco.anns.values() if a['category_id'] in main.params.catIds and not a['iscrowd']]
    of_class = Counter(annotation['category_id'] for annotation in objects)
    of_size = [sum(low <= a['area'] <= high for a in objects) for low, high in summaries[first].params.areaRng]
    images = os.path.join(dataset.get('data_root') or '', dataset.data_prefix.img)
    matrix = counts[first].matrix

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
            main,
            counts[first].outcomes,
            masks,
        )
        plots = dict(
            curves={name: draw_precision(summary, name) for name, summary in summaries.items()},
            thresholds={name: draw_scores(counted.scores, name) for name, counted in counts.items()},
            confusions={name: draw_confusion(counted.matrix, names) for name, counted in counts.items()},
        )
        plots = {key: {name: embed_figure(figure) for name, figure in found.items()} for key, found in plots.items()}
    return dict(
        counts={name: counted.describe(names) for name, counted in counts.items()},
        images=len(coco.imgs),
        detections=len(main.cocoDt.anns),
        stats={name: [format_metric(value) for value in summary.stats] for name, summary in summaries.items()},
        stat_names=describe_stats(summaries[first].params.maxDets),
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
                format_metric(get_average_precision(summaries[first], i, MIN_IOU)),
                of_class[category],
                matrix[i, i],
                matrix[:, i].sum() - matrix[i, i],
            )
            for i, (name, category) in enumerate(zip(names, main.params.catIds))
        ],
        colours=COLOURS,
        examples=examples,
        data=display_path(evaluator.ann_file),
        folder=display_path(images),
    )
