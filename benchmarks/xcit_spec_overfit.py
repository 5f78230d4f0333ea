# The demo's detector overfits a few real COCO images: see overfit.py.
_base_ = ['../configs/_base_/mask-rcnn_xcit_cpu.py', '../configs/_base_/coco_3x.py']

scale = (384, 384)
train_pipeline = [
    dict(type='CheckedLoadImageFromFile'),
    dict(type='CheckedLoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(pipeline=train_pipeline, filter_cfg=dict(_delete_=True, filter_empty_gt=True)),
)
val_dataloader = val_evaluator = val_cfg = None
test_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline))

max_iters = 700
train_cfg = dict(_delete_=True, type='ExactIterTrainLoop', max_iters=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=max_iters),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.0), clip_grad=dict(max_norm=5))
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(_delete_=True, type='AtomicCheckpointHook', by_epoch=False, interval=max_iters),
)
log_processor = dict(by_epoch=False)
