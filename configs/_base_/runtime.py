# MMDetection's runtime, with the best checkpoint, guards and records of condition numbers.
_base_ = 'mmdet::_base_/default_runtime.py'
custom_imports = dict(imports=['spec_mmdet'])

default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', max_keep_ckpts=2, save_best='coco/segm_mAP'),
    checkpoint_guard=dict(type='CheckpointGuard'),
    conditioning=dict(type='ConditioningHook'),
    schedule_guard=dict(type='ScheduleGuard'),
    finite_guard=dict(type='FiniteGuard'),
    loader_guard=dict(type='LoaderGuard', timeout=600),
    buffer_guard=dict(type='BufferGuard'),
    history=dict(type='HistoryLimit'),
)
env_cfg = dict(dist_cfg=dict(timeout=600))  # timeout in seconds for other processes
vis_backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
visualizer = dict(type='LabelVisualizer', vis_backends=vis_backends)

# `test --tta` merges the detections of the flipped views by these settings.
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
