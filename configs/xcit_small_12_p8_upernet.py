# XCiT-S12/8 + UperNet on ADE20K, 160k iterations.
_base_ = '_base_/upernet_xcit.py'

model = dict(backbone=dict(patch_size=8))
