"""Compute COCO metrics with pycocotools or, several times faster, with faster-coco-eval (C++)."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from mmdet.evaluation import CocoMetric, DumpDetResults
from mmdet.registry import METRICS
from mmengine.dist import collect_results
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from terminaltables import AsciiTable

from ..data import rules
from ..data.reading import AnnotationFile, pause_garbage_collection
from ..errors import InputError
from ..files import write
from ..processes import decide_on_main

LIMITS = (1, 10, 100)  # detections per image in COCO's own summary
# MMDetection's names of the entries in pycocotools' summary. The AR names contain MMDetection's default limits.
AP_ITEMS = dict(mAP=0, mAP_50=1, mAP_75=2, mAP_s=3, mAP_m=4, mAP_l=5)
AR_ITEMS = {'AR@100': 6, 'AR@300': 7, 'AR@1000': 8, 'AR_s@1000': 9, 'AR_m@1000': 10, 'AR_l@1000': 11}
ITEMS = AP_ITEMS | AR_ITEMS


def require_measurable(truth: COCO, kind: str) -> None:
    """Reject objects whose evaluation would not end, or exhaust memory. (Checks before a run find them, too.)

    Raises:
        InputError: naming the first one.
    """
    checked = vars(truth).setdefault('measurable', set())  # kinds; an evaluation overwrites masks
    if kind in checked:
        return
    sizes = {image['id']: (image['width'], image['height']) for image in truth.dataset['images']}
    for annotation in truth.dataset['annotations']:
        if kind == 'segm':
            size = sizes.get(annotation['image_id'], (0, 0))
            sound = rules.can_be_measured(annotation.get('segmentation'), *size)
        else:
            sound = rules.is_finite(annotation['bbox']) and len(annotation['bbox']) == 4
        if not sound:
            index = annotation['id']
            index = truth.get_original('annotations', index) if isinstance(truth, AnnotationFile) else index
            raise InputError(
                f'annotation {index!r:.40}: its {"mask" if kind == "segm" else "box"} cannot be evaluated. Run '
                '"spec-mmdet prepare" on the data to list all faults'
            )
    checked.add(kind)


def prepare_truth(truth: COCO, kind: str) -> COCO:
    """Check annotations and return a copy that an evaluation may change."""
    require_measurable(truth, kind)
    return truth.changeable if isinstance(truth, AnnotationFile) else truth


def read_detections(path: Path, kind: str) -> list[dict]:
    """Read detections of a kind, 'bbox' or 'segm', from a file in COCO's format for results."""
    with pause_garbage_collection():
        results = json.loads(Path(path).read_bytes())
    if kind == 'segm':
        for result in results:
            result.pop('bbox', None)  # pycocotools would use its area instead of the mask's
    return results


class Evaluation(COCOeval):
    """pycocotools' COCOeval that first rejects objects whose evaluation would not end."""

    def __init__(self, truth: COCO, found: COCO, kind: str) -> None:
        super().__init__(prepare_truth(truth, kind), found, kind)


def make_fast_evaluation(truth: COCO, found: COCO, kind: str) -> COCOeval:
    """Return a faster replacement for ``Evaluation``, for 'bbox' and 'segm'; ``evalImgs`` stays empty.

    Recalls and scores are bit-identical to pycocotools. A precision of 1 is 1 / (1 + 2**-52) in pycocotools, so AP can
    differ in its sixteenth digit.
    """
    from faster_coco_eval import COCOeval_faster

    class FastEvaluation(COCOeval_faster):
        summarize = COCOeval.summarize  # uses maxDets=100 for AP; faster-coco-eval's own uses the last of maxDets

    return FastEvaluation(prepare_truth(truth, kind), found, kind, extra_calc=False)


def summarise(evaluation: COCOeval, limits: Sequence[int]) -> COCOeval:
    """Return pycocotools' summary of an accumulated evaluation, without its detections and matches.

    Args:
        evaluation: for at least these limits (``params.maxDets``).
        limits: three numbers of detections per image, ascending.

    Returns:
        ``stats``, the twelve numbers; ``eval``, precision of shape (IoU thresholds, recalls, classes, areas, limits)
        and recall without the second dimension; ``params``.
    """
    places = [evaluation.params.maxDets.index(limit) for limit in limits]
    summary = COCOeval(iouType=evaluation.params.iouType)
    summary.params = copy.copy(evaluation.params)
    summary.params.maxDets = list(limits)
    summary.eval = {name: evaluation.eval[name][..., places] for name in ('precision', 'recall')}
    summary.summarize()
    if LIMITS[-1] not in limits:  # pycocotools' summary has AP at 100 detections only
        precision = summary.eval['precision'][..., 0, -1]
        summary.stats[0] = precision[precision > -1].mean() if (precision > -1).any() else -1
    return summary


def get_average_precision(
    summary: COCOeval, category: int, iou: float | None = None, area: int = 0, limit: int = -1
) -> float:
    """Return the AP of a category, by its place in ``params.catIds``; -1 where it has no objects.

    Args:
        summary: an evaluation that is accumulated.
        category: its place.
        iou: the IoU threshold; by default the mean over all.
        area: the place of the range of areas; by default all sizes.
        limit: the place of the limit of detections per image; by default the last.
    """
    precision = summary.eval['precision'][:, :, category, area, limit]
    if iou is not None:
        precision = precision[np.isclose(summary.params.iouThrs, iou)]
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else -1.0


class PatientMetric(BaseMetric):
    """MMEngine's metric whose computation in the main process may exceed the timeout of the run's process group."""

    def evaluate(self, size: int) -> dict[str, float]:
        """Compute the metrics of all processes' results; see MMEngine's BaseMetric.

        Args:
            size: number of images; samplers can repeat some.
        """
        folder = dict(tmpdir=self.collect_dir) if self.collect_device == 'cpu' else {}
        results = collect_results(self.results, size, self.collect_device, **folder)
        self.results.clear()
        metrics = decide_on_main(lambda: self.compute_metrics(results), 'evaluation')
        return {f'{self.prefix}/{name}' if self.prefix else name: value for name, value in metrics.items()}


@METRICS.register_module()
class CheckedCocoMetric(PatientMetric, CocoMetric):
    """MMDetection's CocoMetric for annotation files with any ids, in any encoding.

    Its arguments and metrics are those of MMDetection, but that wrong arguments are rejected before a run, a detector
    without detections has an AP of 0, ``iou_thrs`` may be a number or a list, AP counts up to the largest of
    ``proposal_nums`` detections if these leave out 100, and ``use_mp_eval`` has no effect.

    Attributes:
        summaries: after an evaluation, for 'bbox' and 'segm', the summary at COCO's own limits (:data:`LIMITS`), or at
            ``proposal_nums`` if these leave out 100.

    Raises:
        InputError: if an argument is wrong.
    """

    evaluate_detections = staticmethod(Evaluation)

    def __init__(
        self, ann_file: str | None = None, *args, iou_thrs: float | Sequence[float] | None = None,
        sort_categories: bool = False, **kwargs,
    ) -> None:  # fmt: skip
        super().__init__(None, *args, **kwargs)
        if iou_thrs is not None:
            self.iou_thrs = np.atleast_1d(iou_thrs).astype(float)
        self.sort_categories = sort_categories
        self.summaries: dict[str, COCOeval] = {}
        if len(self.proposal_nums) != 3:
            raise InputError(f'proposal_nums of the evaluator is {self.proposal_nums}. Use three numbers')
        if unknown := set(self.metric_items or ()) - set(ITEMS):
            raise InputError(
                f'metric_items of the evaluator contains {", ".join(sorted(unknown))}; use some of {", ".join(ITEMS)}'
            )
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=self.backend_args) as path:
                self._coco_api = AnnotationFile(str(path))

    @property
    def annotations(self) -> AnnotationFile | None:
        """The index of the annotation file; None before the first evaluation if it is made of the data set."""
        return self._coco_api

    def find_categories(self, names: Sequence[str]) -> list[int]:
        """Return the categories of the labels, in MMDetection's order, as numbers of the annotation file's index."""
        categories = self._coco_api.get_cat_ids(cat_names=names)
        key = (lambda c: self._coco_api.get_original('categories', c)) if self.sort_categories else categories.index
        return sorted(categories, key=key)

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict[str, str]:
        """Write the detections with the annotation file's own ids; see MMDetection's CocoMetric."""
        original = self._coco_api.get_original
        self.cat_ids = [original('categories', c) for c in self.find_categories(self.dataset_meta['classes'])]
        results = [{**result, 'img_id': original('images', result['img_id'])} for result in results]
        return super().results2json(results, outfile_prefix)

    def compute_metrics(self, results: list[tuple[dict, dict]]) -> dict[str, float]:
        """Compute the metrics of the detections that :meth:`process` has collected.

        Returns:
            By MMDetection's names, for instance ``bbox_mAP_50`` and, with ``classwise``, ``CLASS_precision``.
        """
        truths, predictions = zip(*results)
        with TemporaryDirectory() as folder:
            prefix = self.outfile_prefix or str(Path(folder) / 'results')
            if self._coco_api is None:
                self._coco_api = AnnotationFile(self.gt_to_coco_json(truths, prefix))
            self.img_ids = self._coco_api.get_img_ids()
            files = self.results2json(predictions, prefix)
            metrics: dict[str, float] = {}
            if not any(len(prediction['scores']) for prediction in predictions):
                print_log(
                    f'the detector found nothing in {len(predictions)} images, so AP is 0. Its training may be too '
                    'short, or score_thr in model.test_cfg too high',
                    'current',
                    logging.WARNING,
                )
            if self.format_only:
                print_log(f'wrote {", ".join(sorted(set(files.values())))}', 'current')
                return metrics
            for kind in self.metrics:
                print_log(f'Evaluating {kind}...', 'current')
                if kind == 'proposal_fast':
                    recalls = self.fast_eval_recall(predictions, self.proposal_nums, self.iou_thrs, logger='current')
                    metrics |= {f'AR@{limit}': recall for limit, recall in zip(self.proposal_nums, recalls)}
                elif kind in files:
                    metrics |= self.measure(kind, Path(files[kind]))
                else:
                    raise InputError(
                        f'the evaluator has the metric {kind}, but the detector predicts no masks. Remove this metric'
                    )
        return metrics

    def measure(self, kind: str, path: Path) -> dict[str, float]:
        """Evaluate a file of detections.

        Args:
            kind: 'bbox', 'segm' or 'proposal'.
            path: in COCO's format for results.
        """
        box_or_mask = 'segm' if kind == 'segm' else 'bbox'
        detections = read_detections(path, box_or_mask)
        printed = io.StringIO()
        limits = sorted(self.proposal_nums)
        with pause_garbage_collection(), redirect_stdout(printed):
            evaluation = self.evaluate_detections(self._coco_api, self._coco_api.loadRes(detections), box_or_mask)
            evaluation.params.imgIds = self.img_ids
            evaluation.params.catIds = self.find_categories(self.dataset_meta['classes'])
            evaluation.params.maxDets = sorted({*LIMITS, *limits})
            evaluation.params.iouThrs = self.iou_thrs
            evaluation.params.useCats = int(kind != 'proposal')
            evaluation.evaluate()
            evaluation.accumulate()
            if kind != 'proposal':
                self.summaries[kind] = summarise(evaluation, LIMITS if LIMITS[-1] in limits else limits)
            printed.truncate(printed.seek(0))
            summary = summarise(evaluation, limits)
        text = printed.getvalue()
        if LIMITS[-1] not in limits:
            text = text.replace('maxDets=100 ] = -1.000', f'maxDets={limits[-1]} ] = {summary.stats[0]:.3f}', 1)
        print_log(f'\n{text}', 'current')
        if kind == 'proposal':
            return {item: float(f'{summary.stats[ITEMS[item]]:.3f}') for item in self.metric_items or AR_ITEMS}
        metrics = self.measure_classes(summary) if self.classwise else {}
        for item in self.metric_items or AP_ITEMS:
            metrics[f'{kind}_{item}'] = float(np.round(summary.stats[ITEMS[item]], 3))
        ap = ' '.join(f'{value:.3f}' for value in summary.stats[:6])
        print_log(f'{kind}_mAP_copypaste: {ap}', 'current')
        return metrics

    def measure_classes(self, summary: COCOeval) -> dict[str, float]:
        """Return the AP of each class, NaN for one without objects, and log a table."""
        rows, metrics = [['category', *AP_ITEMS]], {}
        for category in self.find_categories(self.dataset_meta['classes']):
            place = summary.params.catIds.index(category)
            values = [get_average_precision(summary, place, iou) for iou in (None, 0.5, 0.75)]
            values += [get_average_precision(summary, place, area=area) for area in (1, 2, 3)]
            values = [float(np.round(value, 3)) if value > -1 else float('nan') for value in values]
            name = self._coco_api.cats[category]['name']
            rows.append([name, *map(str, values)])
            metrics[f'{name}_precision'] = values[0]
        print_log('\n' + AsciiTable(rows).table, 'current')
        return metrics


@METRICS.register_module()
class FastCocoMetric(CheckedCocoMetric):
    """CheckedCocoMetric that uses :func:`make_fast_evaluation`.

    Raises:
        InputError: if faster-coco-eval is not installed.
    """

    evaluate_detections = staticmethod(make_fast_evaluation)

    def __init__(self, *args, **kwargs) -> None:
        if find_spec('faster_coco_eval') is None:
            raise InputError(
                'FastCocoMetric needs faster-coco-eval. Run: pip install faster-coco-eval, or use CheckedCocoMetric'
            )
        super().__init__(*args, **kwargs)


class DumpPredictions(PatientMetric, DumpDetResults):
    """MMDetection's DumpDetResults that writes the annotation file's own image ids.

    Args:
        out_file_path: a .pkl file.
        metrics: the evaluator's other metrics; one may have an annotation file.
    """

    def __init__(self, out_file_path: str, metrics: Sequence[BaseMetric]) -> None:
        super().__init__(out_file_path=out_file_path)
        self.annotations = next((m.annotations for m in metrics if isinstance(m, CheckedCocoMetric)), None)

    def compute_metrics(self, results: list[dict]) -> dict:
        """Write the predictions atomically."""
        for result in results if self.annotations is not None else ():
            result['img_id'] = self.annotations.get_original('images', result['img_id'])
        write(self.out_file_path, pickle.dumps(results))
        return {}
