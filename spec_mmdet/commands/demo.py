"""The whole way on generated data: make it, train, evaluate, and leave pictures.

Everything is written below data/shapes and work_dirs/demo; each step is a command that can be typed by itself.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from mmdet.datasets.api_wrappers import COCO
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from pycocotools import mask as mask_utils

from ..files import replaced, write, written_aside
from .common import parser, run_command

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

CONFIG = 'xcit_spec_shapes'
DATA = Path('data/shapes')
WORK = Path('work_dirs/demo')


def instances(boxes: list, labels: list, masks: list, scores: list | None = None) -> InstanceData:
    data = InstanceData(
        bboxes=np.asarray(boxes).reshape(-1, 4), labels=np.asarray(labels, int), masks=np.asarray(masks)
    )
    if scores is not None:
        data.scores = np.asarray(scores)
    return data


def draw_predictions(results: Path, out_file: Path, pairs: int = 8) -> None:
    """Draw the first images of the validation set, the truth left and the predictions right, two pairs to a row."""
    coco = COCO(str(DATA / 'annotations' / 'instances_val.json'))
    categories = sorted(coco.cats)
    palette = [(220, 60, 60), (60, 140, 220), (60, 180, 90), (230, 170, 30)]
    visualizer = DetLocalVisualizer(bbox_color=palette, mask_color=palette)
    visualizer.dataset_meta = dict(classes=[coco.cats[c]['name'] for c in categories])
    tiles = []
    for result in pickle.loads(results.read_bytes())[:pairs]:
        image = cv2.cvtColor(cv2.imread(result['img_path']), cv2.COLOR_BGR2RGB)
        truth = [a for a in coco.imgToAnns[result['img_id']] if not a['iscrowd']]
        corners = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in truth)]
        labels = [categories.index(a['category_id']) for a in truth]
        sample = DetDataSample(gt_instances=instances(corners, labels, [coco.annToMask(a) for a in truth]))
        predicted = result['pred_instances']
        masks = [mask_utils.decode(rle) for rle in predicted['masks']]
        sample.pred_instances = instances(predicted['bboxes'], predicted['labels'], masks, predicted['scores'])
        sample = sample.to_tensor()
        sample.gt_instances.masks = sample.gt_instances.masks.bool()
        sample.pred_instances.masks = sample.pred_instances.masks.bool()
        visualizer.add_datasample('demo', image, sample, pred_score_thr=0.5)
        tiles.append(np.pad(visualizer.get_image(), ((6, 6), (6, 6), (0, 0)), constant_values=255))
    rows = [np.hstack(tiles[i : i + 2]) for i in range(0, len(tiles), 2)]
    write(out_file, cv2.imencode('.png', cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))[1].tobytes())


def draw_curves(scalars: Path, out_file: Path) -> None:
    """Draw the losses over the iterations and box and mask AP over the epochs."""
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    train, val = [e for e in entries if 'loss' in e], [e for e in entries if 'coco/bbox_mAP' in e]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for key in ('loss', 'loss_cls', 'loss_bbox', 'loss_mask', 'loss_rpn_cls', 'loss_rpn_bbox'):
        left.plot([e['step'] for e in train], [e[key] for e in train], label=key)
    left.set(xlabel='iteration', ylabel='loss', yscale='log', title='training')
    left.legend()
    for kind, label in (('bbox', 'box AP'), ('segm', 'mask AP')):
        right.plot([e['step'] for e in val], [e[f'coco/{kind}_mAP'] for e in val], marker='o', label=label)
    right.set(xlabel='epoch', ylabel='AP', ylim=(0, 1), title='images not trained on')
    right.legend()
    with written_aside(out_file) as aside:
        figure.savefig(aside, dpi=110, format='png')


def main(argv: Sequence[str] | None = None) -> None:
    parser('demo', __doc__).parse_args(argv)
    start = time.time()
    with replaced(WORK):
        run_command('shapes', DATA)
        run_command('train', CONFIG, '--work-dir', WORK)
        checkpoint = WORK / (WORK / 'last_checkpoint').read_text()
        run_command('test', CONFIG, checkpoint, '--work-dir', WORK / 'test', '--out', WORK / 'test' / 'predictions.pkl')

        draw_predictions(WORK / 'test' / 'predictions.pkl', WORK / 'predictions.png')
        (scalars,) = WORK.glob('*/vis_data/scalars.json')
        draw_curves(scalars, WORK / 'curves.png')
        (metrics,) = (json.loads(path.read_text()) for path in (WORK / 'test').glob('*/*.json'))
        print(f'\n{"":6}{"AP":>8}{"AP50":>8}{"AP75":>8}{"AP small":>10}{"medium":>8}{"large":>8}')
        for kind, name in (('bbox', 'box'), ('segm', 'mask')):
            values = [metrics[f'coco/{kind}_mAP{suffix}'] for suffix in ('', '_50', '_75', '_s', '_m', '_l')]
            print('{:6}{:8.3f}{:8.3f}{:8.3f}{:10.3f}{:8.3f}{:8.3f}'.format(name, *values))
    print(f'\npredictions beside the truth: {WORK / "predictions.png"}')
    print(f'loss and AP curves:           {WORK / "curves.png"}')
    print(f'took {time.time() - start:.0f} s')
