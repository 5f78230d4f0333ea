# UperNet on a SpecXCiT backbone, 160,000 iterations.
_base_ = ['mmseg::_base_/models/upernet_r50.py', 'ade20k.py']

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=_base_.xcit,
    decode_head=dict(in_channels=[384] * 4, num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)

max_iters = 160000
train_cfg = dict(max_iters=max_iters, val_interval=16000)
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=max_iters)]
default_hooks = dict(checkpoint=dict(interval=16000))
