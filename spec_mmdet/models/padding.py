"""Pass a mask of the padding to the backbone, so that predictions do not depend on the other images in a batch."""

from __future__ import annotations

import torch
from mmdet.models import DetDataPreprocessor
from mmdet.registry import MODELS


@MODELS.register_module()
class MaskedDataPreprocessor(DetDataPreprocessor):
    """MMDetection's data preprocessor with a fourth channel: 1 inside an image, 0 in its padding.

    SpecXCiT excludes the padding from the attention's statistics, its convolutions and the position encoding. XCiT's
    reference implementation does not, so published checkpoints were trained with padding in these
    places. Arguments are MMDetection's.

    Raises:
        ValueError: if there are batch augmentations, which would not resize the mask.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.batch_augments:
            raise ValueError('MaskedDataPreprocessor: batch_augments would not change the masks. Remove batch_augments')

    def forward(self, data: dict, training: bool = False) -> dict:
        """Preprocess as MMDetection's does, and return inputs of shape (B, 4, H, W)."""
        sizes = [tuple(image.shape[-2:]) for image in data['inputs']]
        data = super().forward(data, training)
        mask = torch.zeros_like(data['inputs'][:, :1])
        for image, (h, w) in zip(mask, sizes):
            image[:, :h, :w] = 1
        return {**data, 'inputs': torch.cat([data['inputs'], mask], dim=1)}
