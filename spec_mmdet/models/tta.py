"""Test-time augmentation for instance segmentation; MMDetection's merges only boxes."""

from __future__ import annotations

import torch
from mmcv.ops import batched_nms
from mmdet.models import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

FLIP_DIMS = dict(horizontal=[2], vertical=[1], diagonal=[1, 2])


@MODELS.register_module()
class MaskTTAModel(DetTTAModel):
    """Merges the detections in several views of an image by NMS; each kept detection keeps its own mask.

    Args:
        tta_cfg: ``nms``, the config of the NMS, and ``max_per_img``, the number of detections to keep.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        found = [sample.pred_instances for sample in data_samples]
        views = [sample.metainfo for sample in data_samples]
        boxes, scores = self.merge_aug_bboxes([f.bboxes for f in found], [f.scores for f in found], views)
        labels = torch.cat([f.labels for f in found])
        merged = InstanceData(bboxes=boxes, scores=scores, labels=labels)
        if 'masks' in found[0]:
            masks = [
                f.masks.flip(FLIP_DIMS[v['flip_direction']]) if v['flip'] else f.masks for f, v in zip(found, views)
            ]
            merged.masks = torch.cat(masks)
        if len(boxes):
            kept = batched_nms(boxes, scores, labels, self.tta_cfg.nms)[1]
            merged = merged[kept[: self.tta_cfg.max_per_img]]
        result = data_samples[0]
        result.pred_instances = merged
        return result
