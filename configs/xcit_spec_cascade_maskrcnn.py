# XCiT-S12/16 + Cascade Mask R-CNN on COCO, 3x, with spectrally conditioned attention.
_base_ = ['_base_/cascade-mask-rcnn_xcit.py', '_base_/coco_3x.py']

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
