"""A segmentor's inference as one ONNX graph, from image to a map of labels, and a model that runs it."""

from __future__ import annotations

import torch
from mmdet.registry import MODELS
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from .onnx import OnnxModel, preprocess

INPUTS, OUTPUTS = ('image', 'size'), ('labels',)


class SegmentorGraph(nn.Module):
    """A segmentor's inference on one image, in operations that ONNX supports.

    Args:
        segmentor: MMSegmentation's EncoderDecoder with the head of Semantic FPN or UperNet, in evaluation mode.

    Raises:
        ValueError: if the segmentor, its head or its inference is not supported.
    """

    def __init__(self, segmentor: nn.Module) -> None:
        from mmseg.models import EncoderDecoder
        from mmseg.models.decode_heads import FPNHead, UPerHead
        from mmseg.models.utils import Upsample

        super().__init__()
        self.segmentor, head = segmentor, getattr(segmentor, 'decode_head', None)
        decoders = {FPNHead: decode_semantic_fpn, UPerHead: decode_upernet}
        if type(segmentor) is not EncoderDecoder or type(head) not in decoders:
            name = type(segmentor if head is None else head).__name__
            raise ValueError(f'{name} cannot be exported; supported: EncoderDecoder with FPNHead (Semantic FPN) or '
                             'UPerHead (UperNet)')  # fmt: skip
        self.decode = decoders[type(head)]
        if segmentor.test_cfg.mode != 'whole':
            raise ValueError("only inference on whole images can be exported; set model.test_cfg.mode='whole'")
        if segmentor.data_preprocessor.test_cfg:
            raise ValueError('padding cannot be exported; set model.data_preprocessor.test_cfg=None')
        if segmentor.align_corners or segmentor.out_channels == 1:
            raise ValueError('align_corners=True and heads with one output cannot be exported')
        for part in [*head.modules()]:
            for name, child in part.named_children():
                if type(child) is Upsample:
                    setattr(part, name, Enlarge(int(child.scale_factor)))

    def forward(self, image: Tensor, size: Tensor) -> Tensor:
        """Segment an image.

        Args:
            image: RGB pixels at the segmentor's input size, uint8, shape (1, 3, H, W).
            size: height and width of the original image, int64, shape (2,).

        Returns:
            The label of each pixel of the original image, int64, shape (height, width).
        """
        head = self.segmentor.decode_head
        features = self.segmentor.backbone(preprocess(self.segmentor.data_preprocessor, image))
        # In channels_last, torch.export cannot prove that strides fit all sizes.
        features = [x.flatten().view_as(x) for x in features]
        if self.segmentor.with_neck:
            features = self.segmentor.neck(features)
        logits = head.cls_seg(self.decode(head, [features[i] for i in head.in_index]))
        # As MMSegmentation: to the size of the input first, then to that of the original image.
        logits = resize(logits, *image.shape[-2:])
        return resize(logits, size[0].item(), size[1].item())[0].argmax(dim=0)


def decode_semantic_fpn(head: nn.Module, features: list[Tensor]) -> Tensor:
    """Return the map that an FPNHead classifies, from its maps."""
    maps = [scale_head(x) for scale_head, x in zip(head.scale_heads, features)]
    return sum(resize(x, *maps[0].shape[-2:]) for x in maps)


def decode_upernet(head: nn.Module, features: list[Tensor]) -> Tensor:
    """Return the map that an UPerHead classifies, from its maps."""
    *levels, top = features
    parts = [(bins.output_size, convolution) for bins, convolution in head.psp_modules]
    parts = [resize(convolution(pool(top, bins)), *top.shape[-2:]) for bins, convolution in parts]
    levels = [convolution(x) for convolution, x in zip(head.lateral_convs, levels)]
    levels.append(head.bottleneck(torch.cat([top, *parts], dim=1)))
    for i in range(len(levels) - 1, 0, -1):
        levels[i - 1] = levels[i - 1] + resize(levels[i], *levels[i - 1].shape[-2:])
    first, *maps = [*(convolution(x) for convolution, x in zip(head.fpn_convs, levels)), levels[-1]]
    return head.fpn_bottleneck(torch.cat([first, *(resize(x, *first.shape[-2:]) for x in maps)], dim=1))


class Enlarge(nn.Module):
    """Bilinear enlargement by an integer factor."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return resize(x, self.factor * x.shape[-2], self.factor * x.shape[-1])


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize maps, shape (1, C, H, W), as PyTorch's bilinear interpolate does, which cannot be traced for any size."""
    return weigh(x, weigh_pixels(height, x.shape[-2]), weigh_pixels(width, x.shape[-1]))


def pool(x: Tensor, bins: int) -> Tensor:
    """Average maps, shape (1, C, H, W), in bins x bins parts, as PyTorch's adaptive pooling, which ONNX lacks."""
    return weigh(x, weigh_parts(bins, x.shape[-2]), weigh_parts(bins, x.shape[-1]))


def weigh(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """Multiply the columns and rows of maps, shape (1, C, H, W), by weights, shapes (height, H) and (width, W)."""
    # Not @, which merges dimensions; torch.export cannot prove that their product fits all sizes.
    down, across = (weights.expand(x.shape[1], -1, -1) for weights in (down, across))
    return torch.bmm(torch.bmm(down, x[0]), across.mT)[None]


def weigh_pixels(target: int, source: int) -> Tensor:
    """Return the weights of bilinear resizing of a side, shape (target, source)."""
    place = (torch.arange(target) + 0.5) * (source / target) - 0.5
    return (1 - (place.clamp(0, source - 1)[:, None] - torch.arange(source)).abs()).clamp(min=0)


def weigh_parts(parts: int, source: int) -> Tensor:
    """Return the weights of averaging a side in parts, which can overlap, shape (parts, source)."""
    number, place = torch.arange(parts)[:, None], torch.arange(source)
    start, end = number * source // parts, ((number + 1) * source + parts - 1) // parts
    return ((start <= place) & (place < end)) / (end - start)


@MODELS.register_module()
class OnnxSegmentor(OnnxModel):
    """An exported segmentor."""

    OUTPUTS = OUTPUTS
    KIND = 'segmentor'

    def forward(self, inputs: list[Tensor], data_samples: list[BaseDataElement], mode: str = 'predict'):
        """Add the maps of labels of images to their data samples; see :meth:`OnnxModel.run`."""
        for image, sample in zip(inputs, data_samples, strict=True):
            (labels,) = self.run(image, sample)
            sample.pred_sem_seg = PixelData(data=labels[None])
        return data_samples
