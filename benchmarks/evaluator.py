"""Time FastCocoMetric's evaluation against that of pycocotools, on as many detections as COCO's validation set gets.

    python -m benchmarks.evaluator data/coco/annotations/instances_val2017.json

The images of the annotation file are repeated until there are enough. The detections are generated, 100 in each image
with objects. The times cover everything from the loaded detections to COCO's twelve metrics.
"""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.data.reading import read_coco
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.metrics import make_fast_evaluation

from .coco_scale import PER_IMAGE, displace, repeat_images


def detect(image: dict, objects: list[dict], categories: list[int], rng: np.random.Generator) -> list[dict]:
    """Generate detections for an image by moving and stretching its objects: boxes as [x, y, w, h], masks as RLE."""
    found = []
    for i in rng.integers(len(objects), size=PER_IMAGE if objects else 0):
        (x0, y0, x1, y1), mask = displace(objects[i], image, rng)
        found.append(
            dict(
                image_id=image['id'],
                category_id=objects[i]['category_id'] if rng.random() < 0.6 else int(rng.choice(categories)),
                score=rng.random(),
                bbox=[x0, y0, x1 - x0, y1 - y0],
                segmentation=mask,
            )
        )
    return found


def measure(evaluator, truth: dict, found: list[dict], kind: str) -> tuple[float, COCOeval]:
    """Run an evaluator; returns its seconds, and the evaluator with its results."""
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)  # evaluators change it
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        other = dict(bbox='segmentation', segm='bbox')[kind]  # without this field the areas are those of the kind
        results = coco.loadRes([{k: v for k, v in detection.items() if k != other} for detection in found])
        start = time.perf_counter()
        evaluation = evaluator(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return time.perf_counter() - start, evaluation


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmarks.evaluator', __doc__, 'python -m')
    options.add_argument('ann_file', type=Path, help="an annotation file in COCO's format")
    options.add_argument('--images', type=int, default=5000)
    args = options.parse_args(argv)
    if args.images < 1:
        raise InputError('--images: at least 1')
    coco = repeat_images(read_coco(args.ann_file), args.images)
    rng = np.random.default_rng(0)
    of_image = {image['id']: [] for image in coco['images']}
    for annotation in coco['annotations']:
        if not annotation['iscrowd']:
            of_image[annotation['image_id']].append(annotation)
    categories = [category['id'] for category in coco['categories']]
    found = [d for image in coco['images'] for d in detect(image, of_image[image['id']], categories, rng)]
    print(f'{args.images} images, {len(coco["annotations"])} objects, {len(found)} detections')
    print(f'{"":6}{"pycocotools":>14}{"faster-coco-eval":>18}{"ratio":>8}{"AP":>8}   largest difference of any metric')
    for kind, name in (('bbox', 'boxes'), ('segm', 'masks')):
        slow, theirs = measure(COCOeval, coco, found, kind)
        fast, ours = measure(make_fast_evaluation, coco, found, kind)
        pairs = [(theirs.eval[key], ours.eval[key]) for key in ('precision', 'recall', 'scores')]
        difference = max(np.abs(a - b).max() for a, b in [*pairs, (theirs.stats, ours.stats)])
        print(f'{name:6}{slow:>12.1f} s{fast:>16.1f} s{slow / fast:>8.1f}{ours.stats[0]:>8.3f}   {difference:.2g}')


if __name__ == '__main__':
    with command_line():
        main()
