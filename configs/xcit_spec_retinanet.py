# XCiT-S12/16 + RetinaNet on COCO, 3x, with spectrally conditioned attention.
_base_ = ['_base_/retinanet_xcit.py', '_base_/coco_3x.py']

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
