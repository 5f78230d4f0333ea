"""Overfit a few real COCO images from scratch: a check that boxes, masks, categories and evaluation agree.

    python -m benchmarks.overfit data/coco

Trains a small detector on the first images of train2017 that contain objects, then evaluates it on the same images. An
AP far below 1 means that something between the annotations and the evaluation is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser, run_command
from spec_mmdet.files import write
from spec_mmdet.training.resume import require_no_checkpoints

CONFIG = Path(__file__).with_name('xcit_spec_overfit.py')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmarks.overfit', __doc__, 'python -m')
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


if __name__ == '__main__':
    with command_line():
        main()
