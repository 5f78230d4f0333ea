"""Export a detector's backbone to ONNX, and check it against the backbone in PyTorch.

    spec-mmdet export xcit_spec_maskrcnn CHECKPOINT backbone.onnx

W + C is put in the place of W, so that what is exported is a plain XCiT. It takes batches of any number of images of
any size from 64 x 64. Its metadata say, in JSON, what to give it: `image`, float32 of shape (batch, 3, height, width),
channels in the order `channels`, (pixel - `mean`) / `std`; sides that are no multiples of 32 are allowed. Its outputs
are the features at strides 4, 8, 16 and 32. An image that is padded has its padding in the attention, as in training.

Before the file is there, it has been run in ONNX Runtime, on the CPU, on noise of two sizes. What its features are away
from those of the backbone as it was, in float64, may be ten times what PyTorch's are that computes in float32, too.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.export import Dim

from ..checkpoints.layouts import recognise
from ..checkpoints.pretrained import load_backbone
from ..checkpoints.reading import load
from ..conditioning import describe_conditioning, fold
from ..errors import InputError
from ..files import written_aside
from ..models import xcit
from ..models.attention import XCA
from ..models.xcit import SpecXCiT
from .common import add_config, load_config, parser

STRIDES = (4, 8, 16, 32)
MIN_SIZE = 64  # at stride 32 a size of one would be taken for a constant
ALLOWANCE = 10
# In the larger one the tokens are more than the MLP takes at a time, in the smaller few enough for the plain attention.
CHECKED = ((2, 3, 64, 96), (1, 3, 544, 576))


class Features(nn.Module):
    """A backbone's features, without the comparison of the sides that its own forward begins with."""

    def __init__(self, backbone: SpecXCiT) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = nn.ModuleList((backbone.fpn1, backbone.fpn2, backbone.fpn3, backbone.fpn4))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(fpn(tap) for fpn, tap in zip(self.fpn, self.backbone.taps(image)))


def export(backbone: SpecXCiT, path: Path, metadata: dict[str, object]) -> None:
    """Write a backbone as ONNX, its batch, height and width left open.

    Args:
        backbone: in evaluation mode. It is folded, and takes the Gram form of the attention for any image.
        path: the file to write.
        metadata: written into it, each value as JSON.
    """
    fold(backbone)
    # The choices that depend on the size would hold for the example's alone, as would encodings that are kept.
    for module in backbone.modules():
        if isinstance(module, XCA):
            module.gram_from = 0
    kept, xcit.fourier_features = xcit.fourier_features, xcit.fourier_features.__wrapped__
    sides = {0: Dim('batch'), 2: Dim('height', min=MIN_SIZE), 3: Dim('width', min=MIN_SIZE)}
    try:
        program = torch.onnx.export(
            Features(backbone).eval().requires_grad_(False),
            (torch.zeros(2, 3, 128, 192),),
            input_names=['image'],
            output_names=[f'stride{stride}' for stride in STRIDES],
            dynamic_shapes=(sides,),
            dynamo=True,
            verbose=False,
        )
    finally:
        xcit.fourier_features = kept
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(path)


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


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('export', __doc__)
    add_config(options)
    options.add_argument('checkpoint', help='in any layout of XCiT; a file, or an http(s) address')
    options.add_argument('out', type=Path, help='the .onnx file to write')
    args = options.parse_args(argv)

    lacking = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if find_spec(name) is None]
    if lacking:
        raise InputError(f"exporting needs {', '.join(lacking)}: pip install -e '.[export]'")
    if args.out.suffix != '.onnx':
        raise InputError(f'{args.out}: the name must end in .onnx')
    if args.out.exists():
        raise InputError(f'{args.out}: is there already; name another file, or remove it')
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every tensor that it loads
    logging.getLogger('onnxscript').setLevel('ERROR')  # it tells what it could not optimise
    register_all_modules()
    cfg = load_config(args)
    model = cfg.get('model', {})
    if model.get('backbone', {}).get('type') != 'SpecXCiT':
        raise InputError(f'config {args.config}: has no SpecXCiT for a backbone, and no other is exported')
    missing = recognise(load(args.checkpoint, mmap=True), f'checkpoint {args.checkpoint}').missing
    if missing:
        raise InputError(f"checkpoint {args.checkpoint}: is no detector's, it lacks {', '.join(missing)}")
    backbone = MODELS.build(dict(model.backbone, norm_cfg=dict(type='BN'), compile=None))
    load_backbone(backbone, args.checkpoint)
    backbone.eval()

    preprocessor = model.data_preprocessor
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

    with written_aside(args.out) as aside:
        export(backbone, aside, metadata)
        difference = largest_difference([run_onnx(aside, x) for x in images], exact)
        print('largest difference from PyTorch in float64, relative to the largest feature: '
              f'{difference:.2g} (PyTorch in float32: {rounding:.2g})')  # fmt: skip
        if difference > ALLOWANCE * rounding:
            raise InputError(f'{args.out}: not written, as it does not compute what the backbone does: its features '
                             f'differ by {difference:.2g}')  # fmt: skip
    for key, value in metadata.items():
        print(f'{key + ":":14}{value}')
    print(f'wrote {args.out}')
