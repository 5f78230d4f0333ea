# XCiT-S12/16 + Mask R-CNN on COCO, 1x, with spectrally conditioned attention.
_base_ = ['_base_/mask-rcnn_xcit.py', '_base_/coco_1x.py']

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
