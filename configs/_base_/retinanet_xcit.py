# RetinaNet (boxes only) on a SpecXCiT backbone.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'runtime.py']

# It reads no map of stride 4.
_base_.xcit.out_strides = (8, 16, 32)
model = dict(backbone=_base_.xcit, neck=dict(in_channels=[384, 384, 384], start_level=0))

default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'), results=dict(type='ResultsHook'))
