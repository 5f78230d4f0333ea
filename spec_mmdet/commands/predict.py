"""Predict on images, folders and videos; write JSON, and pictures with masks, boxes, classes and scores.

    spec-mmdet predict CONFIG CHECKPOINT INPUT... [--score 0.3] [--out DIR]

An INPUT is an image, a folder (without its subfolders), a quoted glob ('images/**/*.jpg') or a video. Pictures in DIR
are named after the inputs, relative to their common folder.

`predictions.json` is a list in COCO's results format with RLE masks. `images.json` contains the images (ids from 1, in
the order of the inputs) and the categories (ids from 1, in the order of the classes). Frames of a video also
have a `frame_id` from 0. `COCO('images.json').loadRes('predictions.json')` reads both files. (pycocotools computes an
object's size from `bbox`; delete `bbox` to use the area of the masks.)

In Python, use the config that training wrote next to the checkpoint; with a config of other classes, MMDetection skips
weights. (This command reads the classes from the checkpoint.)

    import spec_mmdet
    from mmdet.apis import DetInferencer
    inferencer = DetInferencer('CONFIG.py', 'CHECKPOINT.pth', device='cpu')
    results = inferencer('image.png', out_dir='out')
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ..status import show_status
from .common import add_config, add_keep_types, load_config, make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('predict', __doc__)
    add_config(options)
    add_keep_types(options)
    options.add_argument('checkpoint', help='file or URL of a checkpoint, or an exported .onnx file')
    options.add_argument('inputs', nargs='+', metavar='INPUT', help='image, folder, quoted glob or video')
    options.add_argument('--out', type=Path, help='new or empty folder to write (default: a new one in '
                         'work_dirs/predictions)')  # fmt: skip
    options.add_argument('--score', type=float, default=0.3, help='score threshold of the results (default: 0.3)')
    options.add_argument('--batch-size', type=int, default=1, help='images per forward pass (default: 1); above 1, '
                         'images of different sizes are padded, which changes results slightly')  # fmt: skip
    options.add_argument('--device', help='for instance cpu or cuda:1 (default: a GPU if there is one)')
    options.add_argument('--no-pictures', action='store_true', help='write only the JSON files')
    args = options.parse_args(argv)

    from ..errors import InputError
    from ..files import is_empty
    from ..inference.inferencer import load_inferencer, predict_files, require_device
    from ..inference.media import find_inputs
    from ..substitution import protect

    cfg = load_config(args)
    protect(cfg, args.keep_types, running=False)
    if not {'model', 'test_dataloader'} <= cfg.keys():
        raise InputError(f'config {args.config}: lacks a model or test_dataloader. Use the config of a detector')
    if not 0 <= args.score <= 1 or args.batch_size < 1:
        raise InputError('--score must be from 0 to 1, and --batch-size at least 1')
    out = args.out or Path('work_dirs/predictions') / datetime.now().strftime('%Y%m%d_%H%M%S')
    if out.exists() and not is_empty(out):
        raise InputError(f'--out {out}: exists and is not empty. Pass a new folder')
    require_device(args.device)
    paths = find_inputs(args.inputs)
    with show_status('loading the detector'):
        inferencer = load_inferencer(cfg, args.checkpoint, args.device, args.score)
    info = dict(config=args.config, checkpoint=args.checkpoint, score=args.score)
    pictures = not args.no_pictures
    count, damaged, doubts = predict_files(inferencer, paths, out, info, args.score, args.batch_size, pictures)
    for kind, files in doubts.items():
        print(f'warning: {len(files)} {kind}; first: {files[0]}')
    print(f'{count} pictures; wrote {out}')
    for kind, files in damaged.items():
        print(f'skipped {len(files)} {kind}:', *files, sep='\n  ')
    if damaged:
        failed, kind = sum(map(len, damaged.values())), next(iter(damaged))
        raise InputError(f'{failed} of {len(paths)} inputs failed, first {damaged[kind][0]} ({kind}). Replace them; '
                         'the results of the others are written')  # fmt: skip
