# Pretraining of XCiT on ImageNet; the backbone then initialises a detector.
_base_ = '_base_/imagenet_400e.py'

model = dict(backbone=dict(arch='medium_24', drop_path_rate=0.15))
