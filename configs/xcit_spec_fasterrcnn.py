# XCiT-S12/16 + Faster R-CNN on COCO, 3x, with spectrally conditioned attention: for data with boxes only.
_base_ = 'xcit_fasterrcnn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
