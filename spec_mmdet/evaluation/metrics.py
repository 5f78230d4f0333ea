"""COCO's evaluation by faster-coco-eval: the figures of pycocotools in a fraction of the time."""

from __future__ import annotations

from importlib.util import find_spec
from unittest.mock import patch

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmdet.registry import METRICS
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..errors import InputError


def fast_evaluation(truth: COCO | None, found: COCO | None, kind: str) -> COCOeval:
    """What ``COCOeval(truth, found, kind)`` is, in C++, for 'bbox' and 'segm'; it does not fill ``evalImgs``.

    Recalls and scores equal those of pycocotools to the last bit. So do the precisions but one: where a class's best
    precision is that of its first detection alone, pycocotools has 1 / (1 + 2**-52) and this has 1, so that an AP can
    differ in its sixteenth digit.

    Raises:
        InputError: if faster-coco-eval is not installed.
    """
    if find_spec('faster_coco_eval') is None:
        raise InputError('FastCocoMetric needs faster-coco-eval, which is not installed: pip install faster-coco-eval')
    from faster_coco_eval import COCOeval_faster

    class Evaluation(COCOeval_faster):
        # Its own takes AP at the last of maxDets, pycocotools' at 100.
        summarize = COCOeval.summarize

    return Evaluation(truth, found, kind, extra_calc=False)


@METRICS.register_module()
class FastCocoMetric(CocoMetric):
    """MMDetection's CocoMetric, with the same arguments, by :func:`fast_evaluation`.

    Raises:
        InputError: if faster-coco-eval is not installed.
    """

    def __init__(self, *args, **kwargs) -> None:
        fast_evaluation(None, None, 'bbox')  # complains before the detector runs, not after
        super().__init__(*args, **kwargs)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """CocoMetric's metrics of its results."""
        with patch.object(coco_metric, 'COCOeval', fast_evaluation):
            return super().compute_metrics(results)
