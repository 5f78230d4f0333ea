"""Export a detector, or its backbone alone, to ONNX, and check it against PyTorch.

    spec-mmdet export CONFIG CHECKPOINT detector.onnx [--images INPUT...]
    spec-mmdet export xcit_spec_maskrcnn CHECKPOINT backbone.onnx --backbone

A Mask R-CNN, Faster R-CNN or RetinaNet becomes one graph, nms and all. Its inputs are `image`, uint8, (1, 3, height,
width), RGB, scaled as the config scales images for the test (`resize` in the metadata), no side below `min_size`;
`size`, int64, (2,), the height and width of the picture in whose pixels the results are wanted; and `score`, float32,
the least score. Its outputs are, by falling score, `boxes`, x0 y0 x1 y1, (n, 4); `scores`; `labels`, from 0, named by
`classes`; and `masks`, bool, (n, *size). `spec-mmdet predict CONFIG detector.onnx INPUT...` runs it.

A SpecXCiT alone takes batches of any number of images of any size from 64 x 64: `image`, float32, (batch, 3, height,
width), channels in the order `channels`, (pixel - `mean`) / `std`, as its metadata have them in JSON. Its outputs are
the features at strides 4, 8, 16 and 32. An image that is padded has its padding in the attention, as in training.

W is replaced by W + C. Before the file is written, ONNX Runtime runs it on the CPU, on noise of two sizes and on the
images that --images names. A backbone's features may differ from those in float64 by ten times the difference of
PyTorch in float32; 95 % of a detector's results must be the same (where two boxes overlap by just the threshold of nms,
rounding decides).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .common import add_config, load_config, parser


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('export', __doc__)
    add_config(options)
    options.add_argument('checkpoint', help='a file or an http(s) address')
    options.add_argument('out', type=Path, help='the .onnx file to write')
    options.add_argument('--backbone', action='store_true', help='export only the SpecXCiT, of a checkpoint in any '
                         'layout')  # fmt: skip
    options.add_argument('--images', nargs='+', metavar='INPUT', help='images, folders and quoted globs to compare on '
                         '(default: only noise)')  # fmt: skip
    args = options.parse_args(argv)

    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from ..errors import InputError
    from ..inference.exporting import export_backbone, export_detector, require_exporters
    from ..inference.media import find_inputs

    require_exporters()
    if args.out.suffix != '.onnx':
        raise InputError(f'{args.out}: the name must end in .onnx')
    if args.out.exists():
        raise InputError(f'{args.out}: is there already; name another file, or remove it')
    if args.backbone and args.images:
        raise InputError('--images: results on images are not compared of a --backbone; leave one of them out')
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every tensor that it loads
    register_all_modules()
    cfg = load_config(args)
    if args.backbone and cfg.get('model', {}).get('backbone', {}).get('type') != 'SpecXCiT':
        raise InputError(f'config {args.config}: has no SpecXCiT, the only backbone that --backbone exports')
    if args.backbone:
        metadata = export_backbone(cfg, args.checkpoint, args.out)
    else:
        metadata = export_detector(cfg, args.checkpoint, args.out, find_inputs(args.images or []))
    for key, value in metadata.items():
        print(f'{key + ":":14}{value}')
    print(f'wrote {args.out}')
