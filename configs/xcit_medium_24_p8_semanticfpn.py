# XCiT-M24/8 + Semantic FPN on ADE20K, 80k iterations.
_base_ = '_base_/semantic-fpn_xcit.py'

model = dict(
    backbone=dict(arch='medium_24', patch_size=8, drop_path_rate=0.2),
    neck=dict(in_channels=[512] * 4, out_channels=512),
    decode_head=dict(in_channels=[512] * 4),
)
