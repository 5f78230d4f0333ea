"""Time ``spec-mmdet compare`` on synthetic runs: arms x seeds, box and mask AP, 1,000 draws of the images.

    python benchmarks/compare.py [--images 5000] [--classes 80] [--detections 100] [--arms 2] [--seeds 3]

The data are COCO's in shape: 7.3 objects per image by default, class frequencies by Zipf's law, three of four objects
detected with IoU from 0.5 to 1, all other detections false. A table row goes to the terminal.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_utils

WIDTH, HEIGHT = 640, 480


def outline(box: list[float]) -> list[float]:
    """List the corners of an octagon in a box: x0, y0, x1, y1 and so on."""
    x, y, w, h = box
    turns = np.arange(8) * np.pi / 4
    return np.column_stack([x + w * (1 + np.cos(turns)) / 2, y + h * (1 + np.sin(turns)) / 2]).ravel().round(1).tolist()


def make_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes within the image, x, y, width and height, shape (count, 4)."""
    size = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * ([WIDTH, HEIGHT] - size)
    return np.hstack([corner, size]).round(1)


def make_truth(args: argparse.Namespace, rng: np.random.Generator) -> dict:
    """Make an annotation file's content."""
    share = 1 / np.arange(1, args.classes + 1)
    share /= share.sum()
    annotations = []
    for image in range(1, args.images + 1):
        for box in make_boxes(rng.poisson(args.objects), rng).tolist():
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image, category_id=1 + int(rng.choice(args.classes, p=share)),
                bbox=box, area=box[2] * box[3], iscrowd=0, segmentation=[outline(box)],
            ))  # fmt: skip
    images = [dict(id=i, file_name=f'{i}.jpg', width=WIDTH, height=HEIGHT) for i in range(1, args.images + 1)]
    categories = [dict(id=i, name=f'class {i}') for i in range(1, args.classes + 1)]
    return dict(images=images, annotations=annotations, categories=categories)


def make_detections(truth: dict, args: argparse.Namespace, rng: np.random.Generator) -> list[dict]:
    """Make a detector's results: boxes and masks of the objects, displaced, and false positives."""
    found = []
    by_image: dict[int, list[dict]] = {}
    for annotation in truth['annotations']:
        by_image.setdefault(annotation['image_id'], []).append(annotation)
    for image in range(1, args.images + 1):
        hits = [a for a in by_image.get(image, ()) if rng.random() < 0.75][: args.detections]
        boxes = make_boxes(args.detections, rng)
        categories = rng.integers(1, args.classes + 1, args.detections)
        scores = rng.beta(1, 8, args.detections)
        for i, annotation in enumerate(hits):
            box = np.array(annotation['bbox'])
            boxes[i] = box + np.tile(box[2:], 2) * rng.normal(0, rng.uniform(0, 0.12), 4)
            categories[i], scores[i] = annotation['category_id'], rng.beta(2, 1)
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        masks = mask_utils.frPyObjects([outline(box) for box in boxes.tolist()], HEIGHT, WIDTH)
        for box, mask, category, score in zip(boxes.tolist(), masks, categories.tolist(), scores.tolist()):
            mask['counts'] = mask['counts'].decode()
            found.append(dict(image_id=image, category_id=category, bbox=box, score=score, segmentation=mask))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(images=5000, classes=80, detections=100, arms=2, seeds=3).items():
        options.add_argument(f'--{name}', type=int, default=default, help=f'default: {default}')
    options.add_argument('--objects', type=float, default=7.3, help='per image, on average (default: 7.3)')
    args = options.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        truth, runs = make_truth(args, rng), []
        ann_file = Path(root, 'instances_val.json')
        ann_file.write_text(json.dumps(truth))
        for arm in range(args.arms):
            for seed in range(args.seeds):
                run = Path(root, f'{arm}_{seed}')
                (run / 'report').mkdir(parents=True)
                (run / 'config.py').write_text(f'test_evaluator = dict(ann_file={str(ann_file)!r})\n')
                (run / 'run.json').write_text(json.dumps(dict(seed=seed, started=f'{arm} {seed}')))
                found = make_detections(truth, args, rng)
                (run / 'report' / 'detections.segm.json').write_text(json.dumps(found))
                for detection in found:
                    del detection['segmentation']
                (run / 'report' / 'detections.bbox.json').write_text(json.dumps(found))
                runs.append(f'arm{arm}={run}')
        del found
        start = time.perf_counter()
        command = 'from spec_mmdet.commands import main; main()'
        subprocess.run([sys.executable, '-c', command, 'compare', *runs, '--out', Path(root, 'out')], check=True)
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = next((line.partition(': ')[2].strip() for line in Path('/proc/cpuinfo').read_text().splitlines()
                if line.startswith('model name')), 'unknown')  # fmt: skip
    print(f'{args.images} images, {args.classes} classes, {args.detections} detections per image, {args.arms} arms x '
          f'{args.seeds} seeds: {seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU time, at most '
          f'{used.ru_maxrss / 2**20:.1f} GiB in a process; {cpu}')  # fmt: skip


if __name__ == '__main__':
    main()
