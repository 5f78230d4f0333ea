# XCiT-T12/16 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(backbone=dict(arch='tiny_12', drop_path_rate=0.0), neck=dict(in_channels=[192, 192, 192, 192]))
