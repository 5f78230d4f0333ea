# A classifier on SpecXCiT's blocks with XCiT's recipe for ImageNet: 400 epochs, total batch size 1024 (8 x 128).
_base_ = 'runtime.py'
custom_imports = dict(imports=['spec_mmdet', 'spec_mmdet.data.classification'])

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SpecXCiTClassifier',
        num_classes=1000,
        arch='small_12',
        patch_size=16,
        conditioning=None,
        drop_path_rate=0.05,
        norm_cfg=dict(type='BN'),
    ),
    mixing=dict(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=0.5),
    smoothing=0.1,
)

augmented = dict(
    input_size=224,
    is_training=True,
    interpolation='bicubic',
    color_jitter=0.4,
    auto_augment='rand-m9-mstd0.5-inc1',
    re_prob=0.25,
    re_mode='pixel',
)
centred = dict(input_size=224, interpolation='bicubic', crop_pct=1.0)
train_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='RepeatedAugmentation', repeats=3),
    dataset=dict(type='ClassFolder', root='data/imagenet/train', transform=augmented),
    collate_fn=dict(type='default_collate'),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=10,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='ClassFolder', root='data/imagenet/val', transform=centred),
    collate_fn=dict(type='default_collate'),
)
val_evaluator = dict(type='TopK')

max_epochs = 400
train_cfg = dict(type='ExactEpochTrainLoop', max_epochs=max_epochs, val_interval=5)
val_cfg = dict(type='ValLoop')
param_scheduler = [
    dict(type='WarmUpLR', start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
optim_wrapper = dict(
    type='AmpOptimWrapper',
    loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    # As in the recipe, weight decay also acts on the temperature.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(gamma=dict(decay_mult=0.0), cls_token=dict(decay_mult=0.0)),
    ),
)
auto_scale_lr = dict(base_batch_size=1024, enable=False)

default_hooks = dict(
    checkpoint=dict(interval=5, save_best='accuracy/top1'),
    # The moving average is evaluated and saved as the checkpoint's weights.
    ema=dict(type='EMAHook', momentum=4e-5, update_buffers=True),
)
