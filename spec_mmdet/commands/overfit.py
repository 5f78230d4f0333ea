"""Learn a few real COCO images by heart: proof that boxes, masks, categories and evaluation fit together.

    spec-mmdet overfit ../shared/coco_mini

Trains a small detector from scratch on the first images of train2017 that hold objects, then evaluates it on those
same images: an AP far below 1 would mean that something between the annotations and the evaluation is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write
from ..training.resume import require_no_checkpoints
from .common import parser, run_command

CONFIG = 'xcit_spec_overfit'


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('overfit', __doc__)
    options.add_argument('coco', type=Path, help='a folder in the layout of COCO 2017')
    options.add_argument('--images', type=int, default=16)
    options.add_argument('--work-dir', type=Path, default=Path('work_dirs/overfit'))
    args = options.parse_args(argv)

    coco = json.loads((args.coco / 'annotations' / 'instances_train2017.json').read_bytes())
    with_objects = {annotation['image_id'] for annotation in coco['annotations']}
    coco['images'] = [image for image in coco['images'] if image['id'] in with_objects][: args.images]
    chosen = {image['id'] for image in coco['images']}
    coco['annotations'] = [annotation for annotation in coco['annotations'] if annotation['image_id'] in chosen]
    require_no_checkpoints(args.work_dir)
    ann_file = (args.work_dir / 'annotations.json').resolve()
    write(ann_file, json.dumps(coco))

    settings = ['--work-dir', args.work_dir, '--cfg-options', f'test_evaluator.ann_file={ann_file}']
    for loop in ('train', 'test'):
        settings += [f'{loop}_dataloader.dataset.ann_file={ann_file}', f'{loop}_dataloader.dataset.data_root=']
        settings += [f'{loop}_dataloader.dataset.data_prefix.img={(args.coco / "train2017").resolve()}/']
    run_command('train', CONFIG, *settings)
    checkpoint = args.work_dir / (args.work_dir / 'last_checkpoint').read_text()
    run_command('test', CONFIG, checkpoint, *settings)
