# XCiT-S12/16 + Faster R-CNN on COCO, 3x, its attention spectrally conditioned: for data with boxes alone.
_base_ = 'xcit_fasterrcnn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
