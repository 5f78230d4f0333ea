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

W + C is put in the place of W. Before the file is there, it has been run in ONNX Runtime, on the CPU: on noise of two
sizes, and on the images that are named. A backbone's features may be away from those in float64 ten times as far as
PyTorch's in float32; of a detector's results, 95 % must be found by the other, too, in the same place (where
two boxes overlap by just what nms allows, rounding decides).
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.export import Dim
from torchvision.ops import box_iou

from ..checkpoints.layouts import recognise
from ..checkpoints.pretrained import load_backbone
from ..checkpoints.reading import load
from ..conditioning import describe_conditioning, fold
from ..errors import InputError
from ..files import write_atomically
from ..models import xcit
from ..models.attention import XCA
from ..models.onnx import INPUTS, OUTPUTS, DetectorGraph, OnnxDetector
from ..models.xcit import SpecXCiT
from .common import add_config, load_config, parser
from .predict import decode, find_inputs, load_inferencer

STRIDES = (4, 8, 16, 32)
MIN_SIZE = 64  # at stride 32 a size of one would be taken for a constant
ALLOWANCE = 10
# In the larger one the tokens are more than the MLP takes at a time, in the smaller few enough for the plain attention.
CHECKED = ((2, 3, 64, 96), (1, 3, 544, 576))
LEAST_SCORE = 0.001  # of what is compared on noise, where nothing has a higher one
SAME = dict(iou=0.99, score=0.01, share=0.95)  # what two results have in common that are taken for the same


class Features(nn.Module):
    """A backbone's features, without the comparison of the sides that its own forward begins with."""

    def __init__(self, backbone: SpecXCiT) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = nn.ModuleList((backbone.fpn1, backbone.fpn2, backbone.fpn3, backbone.fpn4))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(fpn(tap) for fpn, tap in zip(self.fpn, self.backbone.taps(image)))


def export(
    model: nn.Module,
    example: tuple[Tensor, ...],
    dynamic: tuple[dict | None, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: dict[str, object],
) -> None:
    """Write a model as ONNX.

    Args:
        model: in evaluation mode. What it has of SpecXCiT is folded, and takes the Gram form of the attention for any
            image.
        example: its arguments.
        dynamic: the dimensions of each that are left open.
        path: the file to write.
        inputs: names of the arguments.
        outputs: names of what it returns.
        metadata: written into it, each value as JSON.
    """
    fold(model)
    # The choices that depend on the size would hold for the example's alone, as would encodings that are kept.
    for module in model.modules():
        if isinstance(module, XCA):
            module.gram_from = 0
    kept, xcit.fourier_features = xcit.fourier_features, xcit.fourier_features.__wrapped__
    try:
        program = torch.export.export(model.eval().requires_grad_(False), example, dynamic_shapes=dynamic, strict=False)
    finally:
        xcit.fourier_features = kept
    program = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(path)


def export_backbone(cfg: Config, args: argparse.Namespace) -> dict[str, object]:
    """Write the backbone of a checkpoint, once it computes the same; return its metadata."""
    missing = recognise(load(args.checkpoint, mmap=True), f'checkpoint {args.checkpoint}').missing
    if missing:
        raise InputError(f"checkpoint {args.checkpoint}: is no detector's, it lacks {', '.join(missing)}")
    backbone = MODELS.build(dict(cfg.model.backbone, norm_cfg=dict(type='BN'), compile=None))
    load_backbone(backbone, args.checkpoint)
    backbone.eval()

    preprocessor = cfg.model.data_preprocessor
    metadata = dict(
        mean=preprocessor.get('mean'),
        std=preprocessor.get('std'),
        channels='RGB' if preprocessor.get('bgr_to_rgb') else 'BGR',
        strides=STRIDES,
        conditioning=describe_conditioning(backbone.state_dict()),
        checkpoint=Path(args.checkpoint).name,
    )
    torch.manual_seed(0)
    images = [torch.randn(shape) for shape in CHECKED]
    with torch.no_grad():
        exact = [copy.deepcopy(backbone).double()(x.double()) for x in images]
        rounding = largest_difference([backbone(x) for x in images], exact)

    sides = {0: Dim('batch'), 2: Dim('height', min=MIN_SIZE), 3: Dim('width', min=MIN_SIZE)}
    outputs = [f'stride{stride}' for stride in STRIDES]
    with write_atomically(args.out) as aside:
        example = (torch.zeros(2, 3, 128, 192),)
        export(Features(backbone), example, (sides,), aside, ['image'], outputs, metadata)
        difference = largest_difference([run_onnx(aside, x) for x in images], exact)
        print('largest difference from PyTorch in float64, relative to the largest feature: '
              f'{difference:.2g} (PyTorch in float32: {rounding:.2g})')  # fmt: skip
        if difference > ALLOWANCE * rounding:
            raise InputError(f'{args.out}: not written, as it does not compute what the backbone does: its features '
                             f'differ by {difference:.2g}')  # fmt: skip
    return metadata


def run_onnx(path: Path, image: Tensor) -> list[Tensor]:
    """An exported backbone's features in ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(features) for features in session.run(None, {'image': image.numpy()})]


def largest_difference(found: list[list[Tensor]], exact: list[list[Tensor]]) -> float:
    """Between the feature maps of several images, relative to the largest feature of a map."""
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(torch.inf).item()
        for features, others in zip(found, exact, strict=True)
        for ours, theirs in zip(features, others, strict=True)
    )


def export_detector(cfg: Config, args: argparse.Namespace) -> dict[str, object]:
    """Write a whole detector, once it finds the same; return its metadata."""
    paths = find_inputs(args.images) if args.images else []
    inferencer = load_inferencer(cfg, args.checkpoint, 'cpu')
    detector = inferencer.model.eval().requires_grad_(False)
    try:
        graph = DetectorGraph(copy.deepcopy(detector))
    except ValueError as error:
        raise InputError(f'config {args.config}: {error}; --backbone exports a SpecXCiT alone') from error
    last = detector.roi_head if graph.two_stages else detector.bbox_head
    metadata = dict(
        classes=detector.dataset_meta['classes'],
        score_thr=last.test_cfg.score_thr,
        resize=resizing(cfg),
        conditioning=describe_conditioning(detector.backbone.state_dict()),
        checkpoint=Path(args.checkpoint).name,
    )
    # With fewer pixels the coarsest level could have one row or column, which would be taken for a constant.
    least = max(MIN_SIZE, max(map(max, graph.dense_head.prior_generator.strides)) + 32)
    metadata['min_size'] = least
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*sides, 3), np.uint8) for sides in ((96, 96), (272, 288))]
    example = (torch.zeros(1, 3, 2 * least, 3 * least, dtype=torch.uint8), torch.tensor([100, 150]), torch.tensor(0.05))
    sides = {2: Dim('height', min=least), 3: Dim('width', min=least)}
    with write_atomically(args.out) as aside:
        outputs = OUTPUTS if graph.with_mask else OUTPUTS[:3]
        export(graph, example, (sides, None, None), aside, INPUTS, outputs, metadata)
        exported = OnnxDetector(aside, device='cpu')

        def results(image: np.ndarray) -> list[InstanceData]:
            _, data = next(inferencer.preprocess([image]))
            return [model.test_step(copy.deepcopy(data))[0].pred_instances for model in (detector, exported)]

        print(f'{"what is compared":28} found  in both  largest difference of box (pixels)  score  least IoU of masks')
        for path in paths:
            for _, image in decode(path):
                require_same(path.name, *results(image), args.out)
        last.test_cfg.score_thr = exported.score = LEAST_SCORE
        for image in noise:
            require_same('noise of {} x {}'.format(*image.shape), *results(image), args.out)
    return metadata


def resizing(cfg: Config) -> dict[str, object] | None:
    """How the config scales images for the test."""
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if 'Resize' in str(step['type'])]
    return {key: value for key, value in steps[0].items() if key in ('scale', 'keep_ratio')} if steps else None


def require_same(name: str, expected: InstanceData, found: InstanceData, out: Path) -> None:
    """Print how two detectors' results on an image differ.

    Raises:
        InputError: where too few of them are the same.
    """
    ious = box_iou(expected.bboxes, found.bboxes) * (expected.labels[:, None] == found.labels)
    near = (expected.scores[:, None] - found.scores).abs() < SAME['score']
    pairs = [(i, row.argmax().item()) for i, row in enumerate(ious * near) if len(found) and row.max() >= SAME['iou']]
    ours, theirs = (torch.tensor(side, dtype=torch.long) for side in (zip(*pairs) if pairs else ((), ())))
    a, b = expected[ours], found[theirs]
    boxes, scores, masks = '-', '-', '-'
    if pairs:
        boxes = f'{(a.bboxes - b.bboxes).abs().max():.2g}'
        scores = f'{(a.scores - b.scores).abs().max():.2g}'
        if 'masks' in a:
            union = (a.masks | b.masks).sum(dim=(1, 2)).clamp(min=1)
            masks = f'{((union - (a.masks ^ b.masks).sum(dim=(1, 2))) / union).min():.4f}'
    print(f'{name[-28:]:28} {len(expected):5}  {len(pairs):7}  {boxes:>34}  {scores:>5}  {masks:>18}')
    most = max(len(expected), len(found))
    if len(pairs) < SAME['share'] * most:
        raise InputError(f'{out}: not written, as it does not find what the detector does: of {most} on {name}, '
                         f'{len(pairs)} are the same')  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('export', __doc__)
    add_config(options)
    options.add_argument('checkpoint', help='a file, or an http(s) address')
    options.add_argument('out', type=Path, help='the .onnx file to write')
    options.add_argument('--backbone', action='store_true', help='the SpecXCiT alone, of a checkpoint in any layout')
    options.add_argument('--images', nargs='+', metavar='INPUT', help='images, folders and quoted globs to compare on')
    args = options.parse_args(argv)

    lacking = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if find_spec(name) is None]
    if lacking:
        raise InputError(f"exporting needs {', '.join(lacking)}: pip install -e '.[export]'")
    if args.out.suffix != '.onnx':
        raise InputError(f'{args.out}: the name must end in .onnx')
    if args.out.exists():
        raise InputError(f'{args.out}: is there already; name another file, or remove it')
    if args.backbone and args.images:
        raise InputError('--images: what is found on images is not compared of a --backbone')
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every tensor that it loads
    logging.getLogger('onnxscript').setLevel('ERROR')  # it tells what it could not optimise
    # Of classes that are in the config alone, and of a visualizer without a folder.
    warnings.filterwarnings('ignore', message='dataset_meta or class names')
    warnings.filterwarnings('ignore', module='mmengine.visualization')
    warnings.filterwarnings('ignore', message='`create_unbacked_symint`')  # torchvision's use of it
    register_all_modules()
    cfg = load_config(args)
    if args.backbone and cfg.get('model', {}).get('backbone', {}).get('type') != 'SpecXCiT':
        raise InputError(f'config {args.config}: has no SpecXCiT for a backbone, and no other is exported')
    metadata = (export_backbone if args.backbone else export_detector)(cfg, args)
    for key, value in metadata.items():
        print(f'{key + ":":14}{value}')
    print(f'wrote {args.out}')
