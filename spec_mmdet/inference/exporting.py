"""Export to ONNX, and compare with PyTorch before the file is written."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from mmdet.apis import DetInferencer
from mmdet.registry import MODELS
from mmengine.config import Config
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
from ..models import onnx_segmentor, xcit
from ..models.attention import XCA
from ..models.onnx import INPUTS, OUTPUTS, DetectorGraph, OnnxDetector
from ..models.onnx_segmentor import OnnxSegmentor, SegmentorGraph
from ..models.xcit import SpecXCiT
from .inferencer import SegInferencer, load_inferencer, remove_padding
from .media import decode_file

MIN_SIZE = 64  # torch.export makes a constant of a size of 1, which a smaller image has at stride 32
ALLOWANCE = 10  # times the rounding error of PyTorch in float32
# The smaller size uses the plain attention; the larger one has more tokens than the MLP processes at a time.
COMPARED = ((2, 3, 64, 96), (1, 3, 544, 576))
NOISE_SCORE = 0.001  # score threshold on noise, where all scores are low
# Minimum IoU, maximum difference of scores, minimum share of results; of pixels with the same label.
SAME = dict(iou=0.99, score=0.01, share=0.95, pixels=0.99)


def require_exporters() -> None:
    """Check that the packages for exporting are installed, and silence their log of optimisations."""
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if find_spec(name) is None]
    if missing:
        raise InputError(f'exporting needs {", ".join(missing)}. Run: pip install {" ".join(missing)}')
    logging.getLogger('onnxscript').setLevel('ERROR')
    warnings.filterwarnings('ignore', message='`create_unbacked_symint`')  # used by torchvision


class Features(nn.Module):
    """A backbone without the check of the image size in its forward, which cannot be traced."""

    def __init__(self, backbone: SpecXCiT) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = nn.ModuleList(getattr(backbone, fpn) for fpn in backbone.pyramid)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(fpn(tap) for fpn, tap in zip(self.fpn, self.backbone.compute_tokens(image)))


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
        model: the model. This function sets it to evaluation mode, folds its corrections, and makes its attention use
            the Gram form for images of any size.
        example: its arguments.
        dynamic: the dynamic dimensions of each argument, as for torch.export.
        path: the file to write.
        inputs: names of the arguments.
        outputs: names of the outputs.
        metadata: metadata of the file; values are written as JSON.
    """
    fold(model)
    # Tracing would fix choices by size and cached encodings to the example's size.
    for module in model.modules():
        if isinstance(module, XCA):
            module.gram_from = 0
    kept, xcit.compute_fourier_features = xcit.compute_fourier_features, inspect.unwrap(xcit.compute_fourier_features)
    try:
        program = torch.export.export(model.eval().requires_grad_(False), example, dynamic_shapes=dynamic, strict=False)
    finally:
        xcit.compute_fourier_features = kept
    program = torch.onnx.export(program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    program.save(path)


def export_backbone(cfg: Config, checkpoint: str, out: Path) -> dict[str, object]:
    """Write a checkpoint's SpecXCiT as ONNX if its features equal PyTorch's; return its metadata.

    Raises:
        InputError: if the checkpoint lacks the feature pyramid, or the features differ.
    """
    backbone = MODELS.build(dict(cfg.model.backbone, norm_cfg=dict(type='BN'), compile=None))
    missing = {*recognise(load(checkpoint, mmap=True), f'checkpoint {checkpoint}').missing} & {*backbone.state_dict()}
    if missing:
        raise InputError(f'checkpoint {checkpoint}: lacks {", ".join(sorted(missing))}. Use that of a detector')
    load_backbone(backbone, checkpoint)
    backbone.eval()

    preprocessor = cfg.model.data_preprocessor
    metadata = dict(
        mean=preprocessor.get('mean'),
        std=preprocessor.get('std'),
        channels='RGB' if preprocessor.get('bgr_to_rgb') else 'BGR',
        strides=backbone.out_strides,
        conditioning=describe_conditioning(backbone.state_dict()),
        checkpoint=Path(checkpoint).name,
    )
    torch.manual_seed(0)
    images = [torch.randn(shape) for shape in COMPARED]
    with torch.no_grad():
        exact = [copy.deepcopy(backbone).double()(x.double()) for x in images]
        rounding = compute_largest_difference([backbone(x) for x in images], exact)

    sides = {0: Dim('batch'), 2: Dim('height', min=MIN_SIZE), 3: Dim('width', min=MIN_SIZE)}
    outputs = [f'stride{stride}' for stride in backbone.out_strides]
    with write_atomically(out) as temporary:
        example = (torch.zeros(2, 3, 128, 192),)
        export(Features(backbone), example, (sides,), temporary, ['image'], outputs, metadata)
        difference = compute_largest_difference([run_onnx(temporary, x) for x in images], exact)
        print('largest difference from PyTorch in float64, relative to the largest feature: '
              f'{difference:.2g} (PyTorch in float32: {rounding:.2g})')  # fmt: skip
        if difference > ALLOWANCE * rounding:
            raise InputError(f'{out}: not written, because its features differ from PyTorch by {difference:.2g}. '
                             'Report this with the config')  # fmt: skip
    return metadata


def run_onnx(path: Path, image: Tensor) -> list[Tensor]:
    """Compute an exported backbone's features with ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return [torch.from_numpy(features) for features in session.run(None, {'image': image.numpy()})]


def compute_largest_difference(found: list[list[Tensor]], exact: list[list[Tensor]]) -> float:
    """Compute the largest difference between feature maps, relative to each map's largest feature."""
    return max(
        ((ours - theirs).abs().max() / theirs.abs().max()).nan_to_num(torch.inf).item()
        for features, others in zip(found, exact, strict=True)
        for ours, theirs in zip(features, others, strict=True)
    )


def export_model(cfg: Config, checkpoint: str, out: Path, paths: list[Path]) -> dict[str, object]:
    """Write a detector or segmentor as ONNX if its results equal PyTorch's on noise and on images.

    Returns:
        Its metadata.

    Raises:
        InputError: if the model cannot be exported, or the results differ.
    """
    remove_padding(cfg)
    inferencer = load_inferencer(cfg, checkpoint, 'cpu')
    inferencer.model.eval().requires_grad_(False)
    export_complete = export_detector if isinstance(inferencer, DetInferencer) else export_segmentor
    try:
        return export_complete(inferencer, cfg, Path(checkpoint).name, out, paths)
    except ValueError as error:
        raise InputError(f'config {cfg.filename}: {error}. Pass --backbone to export only the SpecXCiT') from error


def export_segmentor(
    inferencer: SegInferencer, cfg: Config, checkpoint: str, out: Path, paths: list[Path]
) -> dict[str, object]:
    """Write a segmentor; see :func:`export_model`."""
    segmentor = inferencer.model
    graph = SegmentorGraph(copy.deepcopy(segmentor))
    metadata = describe_model(segmentor, cfg, checkpoint, MIN_SIZE)
    example = (torch.zeros(1, 3, 2 * MIN_SIZE, 3 * MIN_SIZE, dtype=torch.uint8), torch.tensor([100, 150]))
    sides = {2: Dim('height', min=MIN_SIZE), 3: Dim('width', min=MIN_SIZE)}
    with write_atomically(out) as temporary:
        export(graph, example, (sides, None), temporary, onnx_segmentor.INPUTS, onnx_segmentor.OUTPUTS, metadata)
        exported = OnnxSegmentor(temporary, device='cpu')
        print(f'{"input":28} equal pixels')
        for name, image in chain(read_images(paths), make_noise()):
            data = inferencer.prepare([image])
            ours, theirs = (
                model.test_step(copy.deepcopy(data))[0].pred_sem_seg.data for model in (segmentor, exported)
            )
            share = (ours == theirs).double().mean().item()
            print(f'{name[-28:]:28} {100 * share:.2f} %')
            if share < SAME['pixels']:
                raise InputError(f'{out}: not written, because only {100 * share:.2f} % of the labels on {name} agree '
                                 'with PyTorch. Report this with the config')  # fmt: skip
    return metadata


def read_images(paths: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the images and frames of files, with the names of the files."""
    for path in paths:
        for _, image in decode_file(path):
            yield path.name, image


def make_noise() -> Iterator[tuple[str, np.ndarray]]:
    """Yield images of noise of two sizes, with names."""
    rng = np.random.default_rng(0)
    for height, width in ((96, 96), (272, 288)):
        yield f'noise of {height} x {width}', rng.integers(0, 256, (height, width, 3), np.uint8)


def export_detector(
    inferencer: DetInferencer, cfg: Config, checkpoint: str, out: Path, paths: list[Path]
) -> dict[str, object]:
    """Write a detector; see :func:`export_model`."""
    detector = inferencer.model
    graph = DetectorGraph(copy.deepcopy(detector))
    last = detector.roi_head if graph.two_stages else detector.bbox_head
    # With fewer pixels the coarsest level could have a size of 1, which torch.export makes a constant.
    least = max(MIN_SIZE, max(map(max, graph.dense_head.prior_generator.strides)) + 32)
    metadata = dict(describe_model(detector, cfg, checkpoint, least), score_thr=last.test_cfg.score_thr)
    example = (torch.zeros(1, 3, 2 * least, 3 * least, dtype=torch.uint8), torch.tensor([100, 150]), torch.tensor(0.05))
    sides = {2: Dim('height', min=least), 3: Dim('width', min=least)}
    with write_atomically(out) as temporary:
        outputs = OUTPUTS if graph.with_mask else OUTPUTS[:3]
        export(graph, example, (sides, None, None), temporary, INPUTS, outputs, metadata)
        exported = OnnxDetector(temporary, device='cpu')

        def results(image: np.ndarray) -> list[InstanceData]:
            _, data = next(inferencer.preprocess([image]))
            return [model.test_step(copy.deepcopy(data))[0].pred_instances for model in (detector, exported)]

        print(f'{"input":28} found  in both  largest difference of box (pixels)  score  lowest IoU of masks')
        for name, image in read_images(paths):
            require_same(name, *results(image), out)
        last.test_cfg.score_thr = exported.score = NOISE_SCORE
        for name, image in make_noise():
            require_same(name, *results(image), out)
    return metadata


def describe_model(model: nn.Module, cfg: Config, checkpoint: str, least: int) -> dict[str, object]:
    """Return the metadata of a complete model whose graph accepts images from ``least`` x ``least`` pixels."""
    return dict(
        classes=model.dataset_meta['classes'],
        resize=describe_resize(cfg),
        conditioning=describe_conditioning(model.backbone.state_dict()),
        checkpoint=checkpoint,
        min_size=least,
    )


def describe_resize(cfg: Config) -> dict[str, object] | None:
    """Return the scale and keep_ratio of the test pipeline's resizing."""
    steps = [step for step in cfg.test_dataloader.dataset.pipeline if 'Resize' in str(step['type'])]
    return {key: value for key, value in steps[0].items() if key in ('scale', 'keep_ratio')} if steps else None


def require_same(name: str, expected: InstanceData, found: InstanceData, out: Path) -> None:
    """Print the differences between the results of two detectors on an image.

    Raises:
        InputError: if too few results agree.
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
    print(f'{name[-28:]:28} {len(expected):5}  {len(pairs):7}  {boxes:>34}  {scores:>5}  {masks:>19}')
    most = max(len(expected), len(found))
    if len(pairs) < SAME['share'] * most:
        raise InputError(f'{out}: not written, because only {len(pairs)} of {most} results on {name} agree with '
                         'PyTorch. Report this with the config')  # fmt: skip
