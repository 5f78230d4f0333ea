# XCiT-S12/8 + Semantic FPN on ADE20K, 80k iterations.
_base_ = '_base_/semantic-fpn_xcit.py'

model = dict(backbone=dict(patch_size=8))
