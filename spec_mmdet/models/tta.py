"""Test-time augmentation for instance segmentation; MMDetection's merges only boxes."""

from __future__ import annotations

import copy

import torch
from mmcv.ops import batched_nms
from mmdet.models import DetTTAModel
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

from ..configs import is_kind_of, is_segmentor
from ..errors import InputError

FLIP_DIMS = dict(horizontal=[2], vertical=[1], diagonal=[1, 2])


@MODELS.register_module()
class MaskTTAModel(DetTTAModel):
    """Test-time augmentation that merges the detections of several views by NMS; kept detections keep their masks.

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


def use_augmentation(cfg: Config, masks: bool) -> None:
    """Enable test-time augmentation in a config, by default with horizontal flips; changes ``cfg``.

    If the detector predicts masks, :class:`MaskTTAModel` replaces MMDetection's DetTTAModel, which cannot merge them.
    """
    if 'panoptic_fusion_head' in cfg.model:
        raise InputError('--tta: not possible with panoptic segmentation, whose maps cannot be merged. Leave it out')
    own = 'tta_pipeline' in cfg and cfg.get('tta_model') and not is_kind_of(cfg.tta_model, MODELS, DetTTAModel)
    if is_segmentor(cfg) and not own:
        raise InputError("--tta: a segmentor needs tta_model=dict(type='SegTTAModel') and a tta_pipeline, as in the "
                         "configs of MMSegmentation. Add them to the config")  # fmt: skip
    if masks and 'tta_model' in cfg and MODELS.get(cfg.tta_model.type.removeprefix('mmdet.')) is DetTTAModel:
        print('tta_model: replaced DetTTAModel, which cannot merge masks, by MaskTTAModel')
        cfg.tta_model.type = 'MaskTTAModel'
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='MaskTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        views = [
            [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
            [dict(type='PackDetInputs', meta_keys=keys)],
        ]
        cfg.tta_pipeline = [*copy.deepcopy(dataset.pipeline[:-1]), dict(type='TestTimeAug', transforms=views)]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline
