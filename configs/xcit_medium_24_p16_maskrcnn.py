# XCiT-M24/16 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(backbone=dict(arch='medium_24', drop_path_rate=0.15), neck=dict(in_channels=[512, 512, 512, 512]))
