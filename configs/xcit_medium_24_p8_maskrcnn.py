# XCiT-M24/8 + Mask R-CNN on COCO, 3x.
_base_ = 'xcit_maskrcnn.py'

model = dict(
    backbone=dict(arch='medium_24', patch_size=8, drop_path_rate=0.15), neck=dict(in_channels=[512, 512, 512, 512])
)
