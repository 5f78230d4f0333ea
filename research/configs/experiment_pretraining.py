# The experiment's pretraining on pictures of single objects: see research/experiment.
_base_ = '../../configs/_base_/imagenet_400e.py'

size = 48
max_epochs = 5
model = dict(
    backbone=dict(arch=dict(_delete_=True, dim=96, depth=6, num_heads=4), patch_size=8, drop_path_rate=0.0),
    mixing=None,
)
dataset = dict(
    transform=dict(
        _delete_=True, input_size=size, is_training=True, scale=(0.6, 1.0), vflip=0.5, interpolation='bilinear'
    )
)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    batch_size=64, sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True), dataset=dataset, **loader
)
val_dataloader = dict(dataset=dict(transform=dict(input_size=size)), **loader)

train_cfg = dict(max_epochs=max_epochs, val_interval=1)
param_scheduler = [
    dict(type='WarmUpLR', start_factor=0.01, by_epoch=True, begin=0, end=0.5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5))
default_hooks = dict(
    checkpoint=dict(interval=max_epochs, max_keep_ckpts=1, save_best=None),
    conditioning=dict(interval=125),
    logger=dict(interval=25),
    schedule_guard=None,
    ema=None,
)
