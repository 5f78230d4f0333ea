"""Export a detector, a segmentor or only its backbone to ONNX, and compare it with PyTorch.

    spec-mmdet export CONFIG CHECKPOINT detector.onnx [--images INPUT...]
    spec-mmdet export xcit_spec_maskrcnn CHECKPOINT backbone.onnx --backbone

A Mask R-CNN, Faster R-CNN or RetinaNet becomes one graph that includes NMS:

    input   image   uint8, (1, 3, height, width), RGB, scaled as in the config (`resize` in the metadata), with sides
                    of at least `min_size`
    input   size    int64, (2,), height and width of the original image; boxes and masks are in its pixels
    input   score   float32, (), score threshold
    output  boxes   float32, (n, 4), x0 y0 x1 y1, by falling score
    output  scores  float32, (n,)
    output  labels  int64, (n,), indices of `classes` in the metadata
    output  masks   bool, (n, *size), if the detector has masks

A Semantic FPN or UperNet becomes a graph with the inputs `image` and `size`, and the output `labels`, int64, `size`.

`spec-mmdet predict CONFIG detector.onnx INPUT...` runs it, as does `spec-mmdet test CONFIG detector.onnx`. With
--backbone, the graph accepts batches of any size of images from 64 x 64: `image`, float32, (batch, 3, height, width),
channels in the order of `channels`, (pixel - `mean`) / `std` (all in the metadata). Its outputs are the features at
strides 4, 8, 16 and 32. Padding of an image takes part in the attention, as in training.

W is replaced by W + C. Before the file is written, ONNX Runtime runs it on the CPU, on noise of two sizes and on
--images. The differences of a backbone's features from float64 may be ten times those of PyTorch in float32. For a
detector, 95 % of the results must agree; for a segmentor, 99 % of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..status import show_status
from .common import add_config, load_config, make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('export', __doc__)
    add_config(options)
    options.add_argument('checkpoint', help='file or URL of a checkpoint')
    options.add_argument('out', type=Path, help='new .onnx file to write')
    options.add_argument('--backbone', action='store_true', help='export only the SpecXCiT; the checkpoint may have '
                         'any layout')  # fmt: skip
    options.add_argument('--images', nargs='+', metavar='INPUT', help='images, folders and quoted globs to compare on '
                         '(default: only noise)')  # fmt: skip
    args = options.parse_args(argv)

    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from ..configs import is_kind_of
    from ..errors import InputError
    from ..inference.exporting import export_backbone, export_model, require_exporters
    from ..inference.media import find_inputs
    from ..models.xcit import SpecXCiT

    require_exporters()
    if args.out.suffix != '.onnx':
        raise InputError(f'{args.out}: the name must end in .onnx')
    if args.out.exists():
        raise InputError(f'{args.out}: exists already. Pass another file, or remove it')
    if args.backbone and args.images:
        raise InputError('--images and --backbone cannot be combined. Leave one of them out')
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every loaded tensor
    register_all_modules()
    cfg = load_config(args)
    if args.backbone and not is_kind_of(cfg.get('model', {}).get('backbone') or {}, MODELS, SpecXCiT):
        raise InputError(f'config {args.config}: has no SpecXCiT, which --backbone needs. Leave out --backbone')
    with show_status('exporting, and comparing with PyTorch'):
        if args.backbone:
            metadata = export_backbone(cfg, args.checkpoint, args.out)
        else:
            metadata = export_model(cfg, args.checkpoint, args.out, find_inputs(args.images or []))
    for key, value in metadata.items():
        print(f'{key + ":":14}{value}')
    print(f'wrote {args.out}')
