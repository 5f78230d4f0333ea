"""A detector's inference as one ONNX graph, from image to boxes, scores, labels and masks, and a model that runs it.

The post-processing after MMDetection's heads is rewritten for one image, because MMDetection's own cannot be traced: it
branches on the detections.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.detectors import FasterRCNN, MaskRCNN, RetinaNet
from mmdet.models.necks import FPN
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ..compat import exchanges_channels, normalises
from ..errors import InputError
from .padding import MaskedDataPreprocessor

INPUTS = ('image', 'size', 'score')
OUTPUTS = ('boxes', 'scores', 'labels', 'masks')  # the last only if the detector has masks
DETECTORS = (MaskRCNN, FasterRCNN, RetinaNet)


class DetectorGraph(nn.Module):
    """A detector's inference on one image, in operations that ONNX supports.

    Args:
        detector: MMDetection's Mask R-CNN, Faster R-CNN or RetinaNet with the heads of its shipped configs, in
            evaluation mode.

    Raises:
        ValueError: if the detector, its neck, a head, the box coder or the type of NMS is not supported.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        if type(detector) not in DETECTORS:
            names = ', '.join(kind.__name__ for kind in DETECTORS)
            raise ValueError(f'{type(detector).__name__} cannot be exported; supported detectors: {names}')
        self.two_stages = not isinstance(detector, RetinaNet)
        roi_head = detector.roi_head if self.two_stages else None
        self.dense_head = detector.rpn_head if self.two_stages else detector.bbox_head
        dense = 'rpn_head' if self.two_stages else 'bbox_head'
        parts = {
            dense: RPNHead if self.two_stages else RetinaHead,
            f'{dense}.prior_generator': AnchorGenerator,
            f'{dense}.bbox_coder': DeltaXYWHBBoxCoder,
        }
        configs = [self.dense_head.test_cfg]
        if self.two_stages:
            parts |= {
                'roi_head': StandardRoIHead,
                'roi_head.bbox_roi_extractor': SingleRoIExtractor,
                'roi_head.bbox_head.bbox_coder': DeltaXYWHBBoxCoder,
            }
            configs.append(roi_head.test_cfg)
            if roi_head.with_mask:
                parts |= {'roi_head.mask_head': FCNMaskHead, 'roi_head.mask_roi_extractor': SingleRoIExtractor}
        if type(neck := detector.neck if detector.with_neck else None) is not FPN:
            # PAFPN and others add maps whose sizes agree for some sizes of images only.
            raise ValueError(f'the neck {type(neck).__name__} cannot be exported; use FPN instead')
        for path, expected in parts.items():  # outer parts first: others lack the inner ones
            part = type(attrgetter(path)(detector))
            if part is not expected:
                raise ValueError(f'{part.__name__} cannot be exported; use {expected.__name__} instead')
        for cfg in configs:
            if cfg.nms.get('type', 'nms') != 'nms' or cfg.nms.get('class_agnostic'):
                raise ValueError(f"cannot export {dict(cfg.nms)}; use nms.type='nms' without class_agnostic")
        self.with_mask = self.two_stages and roi_head.with_mask

    def forward(self, image: Tensor, size: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in an image.

        Args:
            image: RGB pixels at the detector's input size, uint8, shape (1, 3, H, W).
            size: height and width of the original image, int64, shape (2,); boxes and masks are in its pixels.
            score: score threshold, float32, shape ().

        Returns:
            By falling score: boxes (x0, y0, x1, y1), shape (n, 4); scores, (n,); labels from 0, int64, (n,); and masks,
            bool, (n, height, width), if the detector has them.
        """
        shape = image.shape[-2:]
        feats = self.detector.neck(self.detector.backbone(preprocess(self.detector.data_preprocessor, image)))
        boxes, scores, labels = self._detect_dense(feats, shape, score)
        if self.two_stages:
            feats = feats[: self.detector.roi_head.bbox_roi_extractor.num_inputs]
            boxes, scores, labels = self._detect_boxes(feats, boxes, shape, score)
        scale = torch.stack([size[1] / shape[1], size[0] / shape[0]]).float().repeat(2)
        found = boxes * scale
        if not self.with_mask:
            return found, scores, labels
        return found, scores, labels, self._make_masks(feats, boxes, labels, found, size)

    def _detect_dense(
        self, feats: Sequence[Tensor], shape: Sequence[int], score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and levels of RPN, or the boxes, scores and labels of RetinaNet."""
        head, cfg = self.dense_head, self.dense_head.test_cfg
        scores_of, deltas_of = head(feats)
        sizes = [level.shape[-2:] for level in scores_of]
        every = head.prior_generator.grid_priors(sizes, device=feats[0].device)
        found = []
        for level, (scores, deltas, priors) in enumerate(zip(scores_of, deltas_of, every, strict=True)):
            scores = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[:, :-1]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)
            if self.two_stages:  # RPN applies NMS by level
                scores, kept = scores[:, 0], torch.arange(scores.shape[0])
                groups = torch.full_like(kept, level)
            else:
                kept, groups = torch.where(scores > score)
                scores = scores[kept, groups]
            scores, order = scores.topk(torch.sym_min(scores.shape[0], cfg.nms_pre))
            kept, groups = kept[order], groups[order]
            boxes = decode(head.bbox_coder, priors[kept], deltas[kept], shape)
            found.append((boxes, scores, groups))
        boxes, scores, groups = (torch.cat(part) for part in zip(*found))
        if cfg.get('min_bbox_size', -1) >= 0:
            (large,) = torch.where((boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(dim=1))
            boxes, scores, groups = boxes[large], scores[large], groups[large]
        return suppress(boxes, scores, groups, shape, cfg.nms.iou_threshold, cfg.max_per_img)

    def _detect_boxes(
        self, feats: Sequence[Tensor], proposals: Tensor, shape: Sequence[int], score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the second stage's boxes, scores and labels."""
        roi_head, cfg = self.detector.roi_head, self.detector.roi_head.test_cfg
        head = roi_head.bbox_head
        scores, deltas = head(pool(roi_head.bbox_roi_extractor, feats, proposals))
        scores = scores.softmax(-1)[:, :-1]
        kept, labels = torch.where(scores > score)
        deltas = deltas.reshape(proposals.shape[0], -1, 4)
        deltas = deltas[kept, labels * (not head.reg_class_agnostic)]
        boxes = decode(head.bbox_coder, proposals[kept], deltas, shape)
        return suppress(boxes, scores[kept, labels], labels, shape, cfg.nms.iou_threshold, cfg.max_per_img)

    def _make_masks(
        self, feats: Sequence[Tensor], boxes: Tensor, labels: Tensor, found: Tensor, size: Tensor
    ) -> Tensor:
        """Predict the masks of ``boxes``, and paste them at ``found`` into an image of ``size``."""
        roi_head = self.detector.roi_head
        masks = roi_head.mask_head(pool(roi_head.mask_roi_extractor, feats, boxes))
        if roi_head.mask_head.class_agnostic:
            labels = torch.zeros_like(labels)
        masks = masks[torch.arange(labels.shape[0]), labels].sigmoid()
        # Bilinear sampling as a product with each side's weights; grid_sample would need two more numbers per pixel.
        across = weigh_cells(found[:, 0], found[:, 2], size[1], masks.shape[2])
        down = weigh_cells(found[:, 1], found[:, 3], size[0], masks.shape[1])
        return down @ masks @ across.transpose(1, 2) >= roi_head.test_cfg.mask_thr_binary


def preprocess(preprocessor: nn.Module, image: Tensor) -> Tensor:
    """Normalise and pad an image, and add the mask's channel, as a model's preprocessor does.

    Args:
        preprocessor: MMDetection's or MMSegmentation's.
        image: RGB pixels, uint8, shape (1, 3, H, W).
    """
    # Pipelines read BGR, so a preprocessor that exchanges red and blue expects the RGB that we have.
    x = (image if exchanges_channels(preprocessor) else image.flip(1)).float()
    if normalises(preprocessor):
        x = (x - preprocessor.mean) / preprocessor.std
    h, w = image.shape[-2:]
    divisor = getattr(preprocessor, 'pad_size_divisor', 1)  # MMSegmentation pads no image of a test
    padding = (0, -w % divisor, 0, -h % divisor)
    if divisor > 1:
        x = F.pad(x, padding, value=float(preprocessor.pad_value))
    if isinstance(preprocessor, MaskedDataPreprocessor):
        x = torch.cat([x, F.pad(torch.ones_like(image[:, :1], dtype=x.dtype), padding)], dim=1)
    return x


def decode(coder: DeltaXYWHBBoxCoder, priors: Tensor, deltas: Tensor, shape: Sequence[int]) -> Tensor:
    """Decode a head's deltas to boxes, shape (n, 4), clipped to an image of ``shape``."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    sides = priors[:, 2:] - priors[:, :2]
    shift = sides * deltas[:, :2]
    largest = abs(math.log(16 / 1000))  # MMDetection's limit of the growth of a side
    half = sides * deltas[:, 2:].clamp(-largest, largest).exp() / 2
    centre = (priors[:, :2] + priors[:, 2:]) / 2 + shift
    x0, y0, x1, y1 = torch.cat([centre - half, centre + half], dim=1).unbind(1)
    w, h = shape[1], shape[0]
    return torch.stack([x0.clamp(0, w), y0.clamp(0, h), x1.clamp(0, w), y1.clamp(0, h)], dim=1)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, shape: Sequence[int], iou_threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply non-maximum suppression by groups to boxes inside an image of ``shape``, and keep the best ``most``."""
    apart = groups[:, None] * (shape[0] + shape[1])
    kept = nms(boxes + apart, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())[:most]
    return boxes[kept], scores[kept], groups[kept]


def pool(extractor: SingleRoIExtractor, feats: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool the features of each box from the pyramid level for its size, shape (n, C, k, k)."""
    rois = F.pad(boxes, (1, 0))
    level_of = extractor.map_roi_levels(rois, len(feats))
    pooled, order = [], []
    for level, (layer, feat) in enumerate(zip(extractor.roi_layers, feats, strict=True)):
        (kept,) = torch.where(level_of == level)
        sides = layer.output_size
        pooled.append(roi_align(feat, rois[kept], sides, layer.spatial_scale, layer.sampling_ratio, layer.aligned))
        order.append(kept)
    return torch.cat(pooled)[torch.cat(order).argsort()]


def weigh_cells(start: Tensor, end: Tensor, pixels: Tensor, cells: int) -> Tensor:
    """Return the weights by which the pixels of a side sample the cells of masks from ``start`` to ``end``.

    Outside a mask the weights are 0, as in torch's grid_sample. The shape is (n, pixels, cells).
    """
    centres = torch.arange(pixels.item()) + 0.5
    place = (centres - start[:, None]) / (end - start).clamp(min=1e-6)[:, None] * cells - 0.5
    return (1 - (place[..., None] - torch.arange(cells)).abs()).clamp(min=0)


class OnnxModel(BaseModel):
    """An exported model, run by ONNX Runtime, for MMEngine's runner and our inferencer.

    Args:
        path: the .onnx file.
        device: 'cpu' or a CUDA device; by default a GPU if ONNX Runtime supports it.

    Raises:
        InputError: if ONNX Runtime is not installed or cannot read the file, or the file is another model's.
    """

    OUTPUTS: tuple[str, ...]  # outputs that all graphs of this kind have
    KIND: str

    def __init__(self, path: str | Path, device: str | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: needs ONNX Runtime. Run: pip install -e '.[export]'") from error
        known = onnxruntime.get_available_providers()
        provider = 'CUDAExecutionProvider'
        if device and device.startswith('cuda') and provider not in known:
            raise InputError(f'{path}: this ONNX Runtime has no {provider}. Use --device cpu, or install '
                             'onnxruntime-gpu')  # fmt: skip
        if device == 'cpu' or provider not in known:
            provider = 'CPUExecutionProvider'
        try:
            self.session = onnxruntime.InferenceSession(path, providers=[provider])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise InputError(f'{path}: ONNX Runtime cannot read it: {error}') from error
        self.path = path
        self.outputs = [output.name for output in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if self.outputs[: len(self.OUTPUTS)] != list(self.OUTPUTS) or 'classes' not in metadata:
            raise InputError(f'{path}: not a {self.KIND} written by "spec-mmdet export" without --backbone')
        self.metadata = {key: json.loads(value) for key, value in metadata.items()}
        self.classes: list[str] = self.metadata['classes']

    def run(self, image: Tensor, sample: BaseDataElement, **feed: Tensor) -> list[Tensor]:
        """Compute the outputs for an image, uint8 and BGR, as pipelines pack it.

        Raises:
            InputError: if the image is smaller than the graph allows.
        """
        least = self.metadata['min_size']
        if min(image.shape[1:]) < least:
            raise InputError(
                f'an image has a side below {least} pixels after scaling, the minimum of the exported {self.KIND}'
            )
        feed |= dict(image=image.flip(0)[None], size=torch.tensor(sample.ori_shape))
        found = self.session.run(self.outputs, {name: value.cpu().numpy() for name, value in feed.items()})
        return [torch.from_numpy(value) for value in found]


@MODELS.register_module()
class OnnxDetector(OnnxModel):
    """An exported detector. ``score``: score threshold; if the exported detector's is higher, that one applies."""

    OUTPUTS = OUTPUTS[:3]
    KIND = 'detector'

    def __init__(self, path: str | Path, score: float = 0.0, device: str | None = None) -> None:
        super().__init__(path, device)
        self.score = max(score, self.metadata['score_thr'])

    def forward(self, inputs: list[Tensor], data_samples: list[DetDataSample], mode: str = 'predict'):
        """Add the predictions for images to their data samples; see :meth:`OnnxModel.run`."""
        for image, sample in zip(inputs, data_samples, strict=True):
            boxes, scores, labels, *masks = self.run(image, sample, score=torch.tensor(self.score))
            sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
            if masks:
                sample.pred_instances.masks = masks[0]
        return data_samples
