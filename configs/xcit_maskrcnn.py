# XCiT-S12/16 + Mask R-CNN on COCO, 3x: the plain twin of xcit_spec_maskrcnn.py.
_base_ = ['_base_/mask-rcnn_xcit.py', '_base_/coco_3x.py']
