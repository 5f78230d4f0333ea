# XCiT-S24/8 + Semantic FPN on ADE20K, 80k iterations.
_base_ = '_base_/semantic-fpn_xcit.py'

model = dict(backbone=dict(arch='small_24', patch_size=8, drop_path_rate=0.1))
