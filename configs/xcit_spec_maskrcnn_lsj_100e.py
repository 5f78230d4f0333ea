# XCiT-S12/16 + Mask R-CNN on COCO, 100 epochs with large-scale jitter, with spectrally conditioned attention.
_base_ = ['_base_/mask-rcnn_xcit.py', '_base_/coco_lsj_100e.py']

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
