# XCiT-S12/16 + Faster R-CNN on COCO, 3x: for data with boxes only.
_base_ = ['_base_/faster-rcnn_xcit.py', '_base_/coco_3x.py']

val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
