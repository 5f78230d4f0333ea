# Faster R-CNN (boxes only) on a SpecXCiT backbone.
_base_ = ['mmdet::_base_/models/faster-rcnn_r50_fpn.py', 'runtime.py']

model = dict(backbone=_base_.xcit, neck=dict(in_channels=[384, 384, 384, 384]))
default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'), results=dict(type='ResultsHook'))
