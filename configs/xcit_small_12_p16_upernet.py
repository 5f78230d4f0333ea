# XCiT-S12/16 + UperNet on ADE20K, 160k iterations.
_base_ = '_base_/upernet_xcit.py'
