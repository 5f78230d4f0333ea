# Semantic FPN on a SpecXCiT backbone.
_base_ = ['mmseg::_base_/models/fpn_r50.py', 'ade20k.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=_base_.xcit,
    neck=dict(in_channels=[384] * 4, out_channels=384),
    decode_head=dict(in_channels=[384] * 4, num_classes=150),
)
