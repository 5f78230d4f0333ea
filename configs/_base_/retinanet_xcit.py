# RetinaNet (boxes only) on a SpecXCiT backbone.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'runtime.py']

model = dict(backbone=_base_.xcit, neck=dict(in_channels=[384, 384, 384, 384]))
# It does not use the features of stride 4, so that their layer gets no gradient.
find_unused_parameters = True

default_hooks = dict(checkpoint=dict(save_best='coco/bbox_mAP'), results=dict(type='ResultsHook'))
