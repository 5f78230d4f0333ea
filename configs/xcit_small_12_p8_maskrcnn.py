# XCiT-S12/8 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(backbone=dict(patch_size=8))
