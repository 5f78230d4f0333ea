"""Whole detectors as one graph, from an image to boxes, scores, labels and masks, and detectors that run such a graph.

What comes after MMDetection's heads is written here anew for one image, without choices that depend on what is found:
those of MMDetection's own code cannot be traced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RetinaHead, RPNHead
from mmdet.models.detectors import FasterRCNN, MaskRCNN, RetinaNet
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ..compat import exchanges_channels, normalises
from ..errors import InputError
from .padding import MaskedDataPreprocessor

INPUTS = ('image', 'size', 'score')
OUTPUTS = ('boxes', 'scores', 'labels', 'masks')  # a detector without masks has the first three
DETECTORS = (MaskRCNN, FasterRCNN, RetinaNet)


class DetectorGraph(nn.Module):
    """A detector's inference on one image, in operations that ONNX has.

    Args:
        detector: MMDetection's Mask R-CNN, Faster R-CNN or RetinaNet with the heads of its shipped configs, in
            evaluation mode.

    Raises:
        ValueError: with another detector, head, coder of boxes or kind of nms.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector
        if type(detector) not in DETECTORS:
            names = ', '.join(kind.__name__ for kind in DETECTORS)
            raise ValueError(f'{type(detector).__name__} is not one of the detectors that are exported whole: {names}')
        self.two_stages = not isinstance(detector, RetinaNet)
        roi_head = detector.roi_head if self.two_stages else None
        self.dense_head = detector.rpn_head if self.two_stages else detector.bbox_head
        parts = [
            (self.dense_head, RPNHead if self.two_stages else RetinaHead),
            (self.dense_head.prior_generator, AnchorGenerator),
            (self.dense_head.bbox_coder, DeltaXYWHBBoxCoder),
        ]
        configs = [self.dense_head.test_cfg]
        if self.two_stages:
            parts += [
                (roi_head, StandardRoIHead),
                (roi_head.bbox_roi_extractor, SingleRoIExtractor),
                (roi_head.bbox_head.bbox_coder, DeltaXYWHBBoxCoder),
            ]
            configs.append(roi_head.test_cfg)
            if roi_head.with_mask:
                parts += [(roi_head.mask_head, FCNMaskHead), (roi_head.mask_roi_extractor, SingleRoIExtractor)]
        for part, expected in parts:
            if type(part) is not expected:
                raise ValueError(f'{type(part).__name__} is not exported: in its place, only {expected.__name__} is')
        for cfg in configs:
            if cfg.nms.get('type', 'nms') != 'nms' or cfg.nms.get('class_agnostic'):
                raise ValueError(f'an nms other than the plain one by classes is not exported: {dict(cfg.nms)}')
        self.with_mask = self.two_stages and roi_head.with_mask

    def forward(self, image: Tensor, size: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        """What the detector finds in an image.

        Args:
            image: RGB pixels, uint8, shape (1, 3, H, W), of the size at which the detector is to look at it.
            size: height and width, int64, shape (2,), of the image in whose pixels boxes and masks are wanted.
            score: what is found has more than this, float32, shape ().

        Returns:
            By falling score: boxes, x0 y0 x1 y1, shape (n, 4); scores (n,); labels from 0, int64, (n,); and where
            the detector has masks, those, bool, (n, height, width).
        """
        shape = image.shape[-2:]
        feats = self.detector.neck(self.detector.backbone(self._preprocess(image)))
        boxes, scores, labels = self._detect_dense(feats, shape, score)
        if self.two_stages:
            feats = feats[: self.detector.roi_head.bbox_roi_extractor.num_inputs]
            boxes, scores, labels = self._detect_boxes(feats, boxes, shape, score)
        scale = torch.stack([size[1] / shape[1], size[0] / shape[0]]).float().repeat(2)
        found = boxes * scale
        if not self.with_mask:
            return found, scores, labels
        return found, scores, labels, self._make_masks(feats, boxes, labels, found, size)

    def _preprocess(self, image: Tensor) -> Tensor:
        """Normalised, padded, and with a channel that says where, as the detector's own preprocessor does it."""
        preprocessor = self.detector.data_preprocessor
        # Pixels are read as BGR, so that one that exchanges red and blue wants them in the order in which they are.
        x = (image if exchanges_channels(preprocessor) else image.flip(1)).float()
        if normalises(preprocessor):
            x = (x - preprocessor.mean) / preprocessor.std
        h, w = image.shape[-2:]
        divisor = preprocessor.pad_size_divisor
        padding = (0, -w % divisor, 0, -h % divisor)
        x = F.pad(x, padding, value=float(preprocessor.pad_value))
        if isinstance(preprocessor, MaskedDataPreprocessor):
            x = torch.cat([x, F.pad(torch.ones_like(image[:, :1], dtype=x.dtype), padding)], dim=1)
        return x

    def _detect_dense(
        self, feats: Sequence[Tensor], shape: Sequence[int], score: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What RPN or RetinaNet finds, of several anchors a position."""
        head, cfg = self.dense_head, self.dense_head.test_cfg
        scores_of, deltas_of = head(feats)
        sizes = [level.shape[-2:] for level in scores_of]
        every = head.prior_generator.grid_priors(sizes, device=feats[0].device)
        found = []
        for level, (scores, deltas, priors) in enumerate(zip(scores_of, deltas_of, every, strict=True)):
            scores = scores[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
            scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[:, :-1]
            deltas = deltas[0].permute(1, 2, 0).reshape(-1, 4)
            if self.two_stages:  # to RPN, each level is a class
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
        """The second stage's boxes, scores and labels."""
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
        """The masks of boxes, pasted where ``found`` has them in an image of ``size``."""
        roi_head = self.detector.roi_head
        masks = roi_head.mask_head(pool(roi_head.mask_roi_extractor, feats, boxes))
        if roi_head.mask_head.class_agnostic:
            labels = torch.zeros_like(labels)
        masks = masks[torch.arange(labels.shape[0]), labels].sigmoid()
        # Bilinear sampling is a product with each side's weights; grid_sample would need two numbers a pixel besides.
        across = weigh_cells(found[:, 0], found[:, 2], size[1], masks.shape[2])
        down = weigh_cells(found[:, 1], found[:, 3], size[0], masks.shape[1])
        return down @ masks @ across.transpose(1, 2) >= roi_head.test_cfg.mask_thr_binary


def decode(coder: DeltaXYWHBBoxCoder, priors: Tensor, deltas: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes, (n, 4), from what a head says of each prior, inside an image of ``shape``."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    sides = priors[:, 2:] - priors[:, :2]
    shift = sides * deltas[:, :2]
    largest = abs(math.log(16 / 1000))  # MMDetection's; a side grows by no more
    half = sides * deltas[:, 2:].clamp(-largest, largest).exp() / 2
    centre = (priors[:, :2] + priors[:, 2:]) / 2 + shift
    x0, y0, x1, y1 = torch.cat([centre - half, centre + half], dim=1).unbind(1)
    w, h = shape[1], shape[0]
    return torch.stack([x0.clamp(0, w), y0.clamp(0, h), x1.clamp(0, w), y1.clamp(0, h)], dim=1)


def suppress(
    boxes: Tensor, scores: Tensor, groups: Tensor, shape: Sequence[int], iou_threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression by groups, of boxes inside an image of ``shape``; the best ``most`` of them."""
    apart = groups[:, None] * (shape[0] + shape[1])
    kept = nms(boxes + apart, scores, torch.tensor(iou_threshold, dtype=torch.float32).item())[:most]
    return boxes[kept], scores[kept], groups[kept]


def pool(extractor: SingleRoIExtractor, feats: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """The features of each box from the level of the pyramid for its size, shape (n, C, k, k)."""
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
    """How much each cell of a mask from ``start`` to ``end`` counts for each pixel of a side, shape (n, pixels, cells).

    Outside a mask, zeros are sampled, as by torch's grid_sample.
    """
    centres = torch.arange(pixels.item()) + 0.5
    place = (centres - start[:, None]) / (end - start).clamp(min=1e-6)[:, None] * cells - 0.5
    return (1 - (place[..., None] - torch.arange(cells)).abs()).clamp(min=0)


@MODELS.register_module()
class OnnxDetector(BaseModel):
    """A detector that was exported whole, run by ONNX Runtime, for MMDetection's inferencer.

    Args:
        path: the .onnx file.
        score: least score of what it finds, where the exported detector's own is smaller.
        device: 'cpu', or one of 'cuda'; by default a GPU where this ONNX Runtime has one.

    Raises:
        InputError: where ONNX Runtime is not installed or cannot read the file, or it is another one.
    """

    def __init__(self, path: str | Path, score: float = 0.0, device: str | None = None) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: running it needs ONNX Runtime: pip install -e '.[export]'") from error
        known = onnxruntime.get_available_providers()
        provider = 'CUDAExecutionProvider'
        if device and device.startswith('cuda') and provider not in known:
            raise InputError(f'{path}: this ONNX Runtime has no {provider}: --device cpu, or install onnxruntime-gpu')
        if device == 'cpu' or provider not in known:
            provider = 'CPUExecutionProvider'
        try:
            self.session = onnxruntime.InferenceSession(path, providers=[provider])
        except Exception as error:  # it has classes of its own for each kind
            raise InputError(f'{path}: ONNX Runtime cannot read it: {error}') from error
        self.outputs = [output.name for output in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if self.outputs[:3] != list(OUTPUTS[:3]) or 'classes' not in metadata:
            raise InputError(f'{path}: is no detector that spec-mmdet export has written (without --backbone)')
        self.classes: list[str] = json.loads(metadata['classes'])
        self.least = json.loads(metadata['min_size'])
        self.score = max(score, json.loads(metadata['score_thr']))

    def forward(self, inputs: list[Tensor], data_samples: list[DetDataSample], mode: str = 'predict'):
        """Fill samples, as MMDetection's detectors do, from images as its pipelines pack them: uint8, BGR.

        Raises:
            InputError: where an image is smaller than the graph allows.
        """
        for image, sample in zip(inputs, data_samples, strict=True):
            if min(image.shape[1:]) < self.least:
                raise InputError(
                    f'an image of {image.shape[2]} x {image.shape[1]} pixels, as the config scales it: the exported '
                    f'detector takes none with a side below {self.least}'
                )
            feed = dict(image=image.flip(0)[None], size=torch.tensor(sample.ori_shape), score=torch.tensor(self.score))
            found = self.session.run(self.outputs, {name: value.numpy() for name, value in feed.items()})
            boxes, scores, labels, *masks = map(torch.from_numpy, found)
            sample.pred_instances = InstanceData(bboxes=boxes, scores=scores, labels=labels)
            if masks:
                sample.pred_instances.masks = masks[0]
        return data_samples
