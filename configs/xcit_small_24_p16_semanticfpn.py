# XCiT-S24/16 + Semantic FPN on ADE20K, 80k iterations.
_base_ = '_base_/semantic-fpn_xcit.py'

model = dict(backbone=dict(arch='small_24', drop_path_rate=0.1))
