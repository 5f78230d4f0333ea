# The demo's data with a small conditioned Semantic FPN, trained from scratch in minutes on two CPU cores.
_base_ = '_base_/semantic-fpn_xcit.py'

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        arch=dict(_delete_=True, dim=96, depth=6, num_heads=4),
        patch_size=8,
        conditioning=dict(type='identity', lam=1.0),
        drop_path_rate=0.0,
        norm_cfg=dict(type='BN'),
    ),
    neck=dict(in_channels=[96] * 4, out_channels=64),
    decode_head=dict(in_channels=[64] * 4, channels=64, num_classes=5, norm_cfg=dict(type='BN')),
)

scale = (128, 128)
train_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=scale),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True,
    _scope_='mmseg',
    type='BaseSegDataset',
    data_root='data/shapes/',
    data_prefix=dict(img_path='train', seg_map_path='labels/train'),
    img_suffix='.png',
    metainfo=dict(classes=('background', 'circle', 'square', 'triangle', 'star')),
    pipeline=train_pipeline,
)
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(dataset, data_prefix=dict(img_path='val', seg_map_path='labels/val'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader

max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=max_iters),
]
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=5))
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=200))
