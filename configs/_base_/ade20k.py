# ADE20K with the augmentation and optimiser of XCiT's published segmentors, 80,000 iterations, on our runtime.
_base_ = ['mmseg::_base_/datasets/ade20k.py', 'runtime.py']

default_scope = 'mmseg'
train_dataloader = dict(batch_size=2)
val_evaluator = dict(_delete_=True, type='SemanticMetric')
test_evaluator = val_evaluator

max_iters = 80000
train_cfg = dict(type='ExactIterTrainLoop', max_iters=max_iters, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=max_iters),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=8000, save_best='semantic/mIoU'),
    results=dict(type='ResultsHook'),
)
log_processor = dict(by_epoch=False)
tta_model = dict(_delete_=True, type='SegTTAModel')
