# What every config has: MMDetection's runtime, the best checkpoint kept, guards, condition numbers, curves, pictures.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['spec_mmdet'])

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook', max_keep_ckpts=2, save_best='coco/segm_mAP'))
guards = [
    dict(type='CheckpointGuard'),
    dict(type='ConditioningHook'),
    dict(type='ScheduleGuard'),
    dict(type='FiniteGuard'),
    dict(type='LoaderGuard', timeout=600),
]
custom_hooks = [*guards, dict(type='ResultsHook')]
env_cfg = dict(dist_cfg=dict(timeout=600))  # seconds to wait for another process
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='LabelVisualizer', vis_backends=vis_backends)

# What tools/test.py --tta adds to its flipped views.
tta_model = dict(type='MaskTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))

# The backbone of every detector: small_12, 16-pixel patches, no conditioning.
xcit = dict(
    _delete_=True,
    type='SpecXCiT',
    arch='small_12',
    patch_size=16,
    drop_path_rate=0.05,
    norm_cfg=dict(type='SyncBN'),
)
