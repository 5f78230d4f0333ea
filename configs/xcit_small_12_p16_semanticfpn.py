# XCiT-S12/16 + Semantic FPN on ADE20K, 80k iterations.
_base_ = '_base_/semantic-fpn_xcit.py'
