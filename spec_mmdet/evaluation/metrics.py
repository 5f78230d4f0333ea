"""COCO's evaluation of detections in data sets with any ids, by pycocotools or, in a fraction of the time, in C++."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmdet.registry import METRICS
from mmengine.logging import print_log
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data import rules
from ..data.reading import AnnotationFile
from ..errors import InputError


def remap_ids(ids: Iterable[int | str], least: int = 0, ascending: bool = False) -> dict[int | str, int]:
    """Whole numbers for ids: themselves where the evaluators hold all of them, or else 1 to n, in their order.

    They go through NumPy's int64 and float64; an annotation's id of 0 stands for no match; and MMDetection takes the
    figures of the classes, which are in ascending order of the ids, for those in the order of the file.
    """
    ids = list(ids)
    plain = all(type(index) is int and least <= index < 2**53 for index in ids)
    if plain and not (ascending and ids != sorted(ids)):
        return {index: index for index in ids}
    return {index: number for number, index in enumerate(ids, start=1)}


def require_measurable(truth: COCO, kind: str) -> None:
    """Refuse objects with which an evaluation would not end, or take all memory, as where the checks were left out.

    Raises:
        InputError: at the first one.
    """
    sizes = {image['id']: (image['width'], image['height']) for image in truth.dataset['images']}
    for annotation in truth.dataset['annotations']:
        box, size = annotation['bbox'], sizes.get(annotation['image_id'], (0, 0))
        sound = rules.is_finite(box) and len(box) == 4
        if kind == 'segm':
            mask = annotation.get('segmentation')
            # Of an evaluation before, in whose place pycocotools has put its own: a file holds no bytes.
            own = isinstance(mask, dict) and isinstance(mask.get('counts'), bytes)
            sound = own or rules.can_be_measured(mask, *size)
        if not sound:
            raise InputError(
                f'the {"mask" if kind == "segm" else "box"} of annotation {annotation["id"]!r:.40} is none that can be '
                'measured by; spec-mmdet prepare lists all that is wrong'
            )


def read_detections(path: Path, kind: str) -> list[dict]:
    """Detections of a kind, 'bbox' or 'segm', from a file in COCO's format for results."""
    results = json.loads(path.read_bytes())
    if kind == 'segm':
        for result in results:
            result.pop('bbox', None)  # or its area would be taken for the mask's
    return results


class RemapIds:
    """A mixin for pycocotools' ``COCOeval``, for ids that it cannot hold: it works on :func:`remap_ids` in their place.

    Its parameters are to be set in the data set's own ids; they and all that it computes are numbers after
    ``evaluate``, as are the ids in its ``cocoGt`` and ``cocoDt``.
    """

    def __init__(self, truth: COCO | None, found: COCO | None, kind: str, **kwargs) -> None:
        if truth is None:
            super().__init__(None, None, kind, **kwargs)
            return
        require_measurable(truth, kind)
        self.images = remap_ids(image['id'] for image in truth.dataset['images'])
        self.categories = remap_ids((category['id'] for category in truth.dataset['categories']), ascending=True)
        super().__init__(self.numbered(truth), self.numbered(found), kind, **kwargs)
        self.params.imgIds, self.params.catIds = list(self.images), list(self.categories)

    def numbered(self, coco: COCO) -> COCO:
        """The same with numbers for ids; itself where they are."""
        objects = coco.dataset['annotations']
        annotations = remap_ids((annotation['id'] for annotation in objects), least=1)
        if all(index is number for ids in (self.images, self.categories, annotations) for index, number in ids.items()):
            return coco
        result = COCO()
        result.dataset = {
            **coco.dataset,
            'images': [{**image, 'id': self.images[image['id']]} for image in coco.dataset['images']],
            'categories': [{**c, 'id': self.categories[c['id']]} for c in coco.dataset['categories']],
            'annotations': [
                {
                    **annotation,
                    'id': annotations[annotation['id']],
                    'image_id': self.images[annotation['image_id']],
                    'category_id': self.categories[annotation['category_id']],
                }
                for annotation in objects
            ],
        }
        result.createIndex()
        return result

    def evaluate(self) -> None:
        """COCOeval's, on numbers."""
        self.params.imgIds = [self.images[index] for index in self.params.imgIds]
        self.params.catIds = [self.categories[index] for index in self.params.catIds]
        super().evaluate()


class Evaluation(RemapIds, COCOeval):
    """pycocotools' COCOeval for any ids."""


def fast_evaluation(truth: COCO | None, found: COCO | None, kind: str) -> COCOeval:
    """What ``Evaluation(truth, found, kind)`` is, in C++, for 'bbox' and 'segm'; it does not fill ``evalImgs``.

    Recalls and scores equal those of pycocotools to the last bit. So do the precisions but one: where a class's best
    precision is that of its first detection alone, pycocotools has 1 / (1 + 2**-52) and this has 1, so that an AP can
    differ in its sixteenth digit.

    Raises:
        InputError: if faster-coco-eval is not installed.
    """
    if find_spec('faster_coco_eval') is None:
        raise InputError('FastCocoMetric needs faster-coco-eval, which is not installed: pip install faster-coco-eval')
    from faster_coco_eval import COCOeval_faster

    class FastEvaluation(RemapIds, COCOeval_faster):
        # Its own takes AP at the last of maxDets, pycocotools' at 100.
        summarize = COCOeval.summarize

    return FastEvaluation(truth, found, kind, extra_calc=False)


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """MMDetection's CocoMetric for annotation files with any ids, in any encoding.

    The files that it writes (``outfile_prefix``) contain the annotation file's own ids.
    """

    evaluation = staticmethod(Evaluation)

    def __init__(self, *args, **kwargs) -> None:
        with patch.object(coco_metric, 'COCO', AnnotationFile):
            super().__init__(*args, **kwargs)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """CocoMetric's metrics of its results."""
        printed = io.StringIO()
        with patch.multiple(coco_metric, COCO=AnnotationFile, COCOeval=self.evaluation), redirect_stdout(printed):
            metrics = super().compute_metrics(results)
        print_log(printed.getvalue(), 'current')
        return metrics


@METRICS.register_module()
class FastCocoMetric(CheckedCocoMetric):
    """CheckedCocoMetric, with the same arguments, by :func:`fast_evaluation`.

    Raises:
        InputError: if faster-coco-eval is not installed.
    """

    evaluation = staticmethod(fast_evaluation)

    def __init__(self, *args, **kwargs) -> None:
        fast_evaluation(None, None, 'bbox')  # complains before the detector runs, not after
        super().__init__(*args, **kwargs)
