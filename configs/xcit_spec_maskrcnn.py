# XCiT-S12/16 + Mask R-CNN on COCO, 3x, with spectrally conditioned attention with lambda = 10 as in the paper.
_base_ = 'xcit_maskrcnn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
