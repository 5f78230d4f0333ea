# The experiment's detector for objects in scenes: see research/experiment.
_base_ = '../../configs/_base_/generated_128.py'

max_epochs = 2
model = dict(backbone=dict(conditioning=None))
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=1, save_best=None),
    conditioning=dict(interval=100),
    schedule_guard=None,
    results=None,
)
