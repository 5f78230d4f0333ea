"""Compare polygons with bitmaps: mask targets of a data set, and time and memory of one large image.

python -m benchmarks.masks FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.utils import register_all_modules

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.configs import find_config, read_config
from spec_mmdet.data.tasks import use_folder
from spec_mmdet.training.running import adapt_to_data

SIDE, FINE = 28, 16  # pixels of a mask target; subdivisions of each for the reference
RESIZE = dict(type='Resize', scale=(1333, 800), keep_ratio=True)
CROP = [
    dict(type='Resize', scale=(1333, 500), keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
]
LARGE = 8000, 6000


def build_pipeline(polygons: bool, *steps: dict) -> Compose:
    load = dict(type='CheckedLoadAnnotations', with_bbox=True, with_mask=True, poly2mask=not polygons)
    steps = load, dict(type='RandomFlip', prob=0.5), *steps, RESIZE, dict(type='PackDetInputs')
    return Compose([TRANSFORMS.build(step) for step in steps])


def compare_targets(folder: Path, count: int, *steps: dict) -> dict[str, float]:
    """Compare mask targets of a training set's objects in boxes that are displaced by 8 % of their size.

    The reference is the polygon's share of each pixel, from 16 x 16 subdivisions, with a threshold of a half.

    Returns:
        Fractions of target pixels that differ, and the processor time of the pipelines.
    """
    cfg = read_config(find_config('xcit_maskrcnn'))
    use_folder(cfg, folder, ['train'])
    adapt_to_data(cfg, ['train'], None, thorough=False)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    decode = TRANSFORMS.build(dict(type='CheckedLoadImageFromFile'))
    kinds = {'bitmaps': build_pipeline(False, *steps), 'polygons': build_pipeline(True, *steps)}
    seconds, wrong = dict.fromkeys(kinds, 0.0), dict.fromkeys(('bitmaps', 'polygons', 'each other'), 0)
    pixels = 0
    for i in range(0, len(dataset), max(1, len(dataset) // count)):
        truths = []
        for kind, pipeline in kinds.items():
            sample = decode(dataset.get_data_info(i))
            random.seed(i), np.random.seed(i)
            start = time.process_time()
            truths.append(pipeline(sample)['data_samples'].gt_instances)
            seconds[kind] += time.process_time() - start
        bitmaps, polygons = (truth.masks for truth in truths)
        boxes = truths[0].bboxes.tensor.numpy()
        sizes = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = (boxes + np.random.default_rng(i).normal(0, 0.08, boxes.shape) * sizes).clip(0, max(RESIZE['scale']))
        boxes, places = boxes.astype(np.float32), np.arange(len(boxes))
        if not len(boxes):
            continue
        cut = lambda masks, side: masks.crop_and_resize(boxes, (side, side), places).to_ndarray()  # noqa: B023, E731
        fine = cut(polygons, SIDE * FINE).reshape(-1, SIDE, FINE, SIDE, FINE).mean((2, 4)) >= 0.5
        targets = cut(bitmaps, SIDE).astype(bool), cut(polygons, SIDE).astype(bool)
        for name, (one, other) in zip(wrong, ((targets[0], fine), (targets[1], fine), targets)):
            wrong[name] += int((one != other).sum())
        pixels += fine.size
    return {name: number / pixels for name, number in wrong.items()} | {f'{kind}, s': s for kind, s in seconds.items()}


def load_large_image(polygons: bool, objects: int) -> dict[str, float]:
    """Load the objects of a large image; return the processor time and the additional peak memory in GB."""
    width, height = LARGE
    draw, instances = random.Random(0), []
    for _ in range(objects):
        x, y, r = draw.uniform(900, width - 900), draw.uniform(900, height - 900), draw.uniform(30, 800)
        outline = [
            v for k in range(40) for v in (x + r * math.cos(k * math.pi / 20), y + r * math.sin(k * math.pi / 20))
        ]
        instances.append(dict(bbox=[x - r, y - r, x + r, y + r], bbox_label=0, mask=[outline], ignore_flag=0))
    image = np.zeros((height, width, 3), np.uint8)
    pipeline = build_pipeline(polygons)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    size = dict(img_shape=(height, width), ori_shape=(height, width), height=height, width=width)
    pipeline(dict(img=image, instances=instances, img_id=0, img_path='', **size))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return dict(seconds=time.process_time() - start, GB=memory / 1e6)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('masks', __doc__, 'python -m benchmarks.')
    options.add_argument('folder', type=Path, help="a data set in COCO's layout")
    options.add_argument('--images', type=int, default=50, help='images to compare targets on (default: 50)')
    options.add_argument('--large', nargs=2, type=json.loads, help=argparse.SUPPRESS)  # of a process of its own
    args = options.parse_args(argv)
    register_all_modules()
    torch.set_num_threads(1)
    if args.large:
        print(json.dumps(load_large_image(*args.large)))
        return
    for name, steps in (('resized', []), ('resized, cropped, resized', CROP)):
        row = compare_targets(args.folder, args.images, *steps)
        print(name, {key: round(value, 4) for key, value in row.items()})
    for polygons, objects in ((False, 25), (True, 25), (True, 1500)):
        command = [sys.executable, '-m', 'benchmarks.masks', str(args.folder), '--large', json.dumps(polygons)]
        lines = subprocess.run([*command, str(objects)], check=True, capture_output=True, text=True).stdout.splitlines()
        print('polygons' if polygons else 'bitmaps', objects, 'objects', json.loads(lines[-1]))


if __name__ == '__main__':
    with command_line():
        main()
