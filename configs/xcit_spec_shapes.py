# The demo: a small conditioned Mask R-CNN, trained from scratch on generated shapes in minutes on two CPU cores.
_base_ = '_base_/generated_128.py'

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
