# XCiT-S12/16 + Mask2Former on COCO panoptic, with MMDetection's schedule of 368,750 iterations; without conditioning.
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'
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
    panoptic_head=dict(in_channels=[384, 384, 384, 384]),
)

# MMDetection's types need panopticapi.
_base_.train_pipeline[1].type = 'CheckedLoadPanopticAnnotations'
_base_.test_pipeline[2].type = 'CheckedLoadPanopticAnnotations'
train_dataloader = dict(dataset=dict(type='CheckedCocoPanopticDataset', pipeline=_base_.train_pipeline))
val_dataloader = dict(dataset=dict(type='CheckedCocoPanopticDataset', pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = [
    dict(_base_.val_evaluator[0], type='PanopticQuality'),
    dict(_base_.val_evaluator[1], type='FastCocoMetric'),
]
test_evaluator = val_evaluator
default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', save_best='coco_panoptic/PQ', rule='greater'),
    results=dict(type='ResultsHook'),
)
