# Mask R-CNN on a SpecXCiT backbone.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'runtime.py']

model = dict(backbone=_base_.xcit, neck=dict(in_channels=[384, 384, 384, 384]))
default_hooks = dict(results=dict(type='ResultsHook'))
