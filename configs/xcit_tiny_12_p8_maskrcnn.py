# XCiT-T12/8 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(
    backbone=dict(arch='tiny_12', patch_size=8, drop_path_rate=0.0), neck=dict(in_channels=[192, 192, 192, 192])
)
