# XCiT-M24/16 + UperNet on ADE20K, 160k iterations.
_base_ = '_base_/upernet_xcit.py'

model = dict(
    backbone=dict(arch='medium_24', drop_path_rate=0.15),
    decode_head=dict(in_channels=[512] * 4),
    auxiliary_head=dict(in_channels=512),
)
