# XCiT-S24/16 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(backbone=dict(arch='small_24', drop_path_rate=0.1))
