# XCiT-T12/8 + UperNet on ADE20K, 160k iterations.
_base_ = '_base_/upernet_xcit.py'

model = dict(
    backbone=dict(arch='tiny_12', patch_size=8, drop_path_rate=0.0),
    decode_head=dict(in_channels=[192] * 4),
    auxiliary_head=dict(in_channels=192),
)
