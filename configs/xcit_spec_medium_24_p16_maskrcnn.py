# XCiT-M24/16 + Mask R-CNN on COCO, 3x, with spectrally conditioned attention.
_base_ = 'xcit_medium_24_p16_maskrcnn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
