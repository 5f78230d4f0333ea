# XCiT on ImageNet, for backbones to start from.
_base_ = '_base_/imagenet_400e.py'

model = dict(backbone=dict(arch='tiny_12', drop_path_rate=0.0))
