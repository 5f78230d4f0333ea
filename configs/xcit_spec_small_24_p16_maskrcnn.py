# XCiT-S24/16 + Mask R-CNN on COCO, 3x, its attention spectrally conditioned.
_base_ = 'xcit_small_24_p16_maskrcnn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
