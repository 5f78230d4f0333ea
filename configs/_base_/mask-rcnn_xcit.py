# Mask R-CNN on a SpecXCiT backbone: small_12, 16-pixel patches, no conditioning.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py']
custom_imports = dict(imports=['spec_mmdet'])

model = dict(
    backbone=dict(
        _delete_=True,
        type='SpecXCiT',
        arch='small_12',
        patch_size=16,
        drop_path_rate=0.05,
        norm_cfg=dict(type='SyncBN'),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='coco/segm_mAP'))
custom_hooks = [dict(type='CheckpointGuard'), dict(type='ConditioningHook')]

# What tools/test.py --tta adds to its flipped views.
tta_model = dict(type='MaskTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
