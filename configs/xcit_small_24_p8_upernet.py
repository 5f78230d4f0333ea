# XCiT-S24/8 + UperNet on ADE20K, 160k iterations.
_base_ = '_base_/upernet_xcit.py'

model = dict(backbone=dict(arch='small_24', patch_size=8, drop_path_rate=0.1))
