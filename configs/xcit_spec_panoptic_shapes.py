# A small conditioned PanopticFPN for the demo's generated shapes, trained from scratch in minutes on two CPU cores.
_base_ = 'xcit_spec_shapes.py'

_base_.train_pipeline[1] = dict(type='CheckedLoadPanopticAnnotations')
_base_.test_pipeline[2] = dict(type='CheckedLoadPanopticAnnotations')
val_pipeline = [dict(type='CheckedLoadImageFromFile'), *_base_.test_pipeline[1:]]

model = dict(
    type='PanopticFPN',
    data_preprocessor=dict(pad_seg=True, mask_pad_value=0, seg_pad_value=255),
    semantic_head=dict(
        type='PanopticFPNHead',
        num_things_classes=4,
        num_stuff_classes=2,
        in_channels=64,
        inner_channels=32,
        norm_cfg=dict(type='GN', num_groups=8),
        loss_seg=dict(type='CrossEntropyLoss', ignore_index=255, loss_weight=0.5),
    ),
    panoptic_fusion_head=dict(type='HeuristicFusionHead', num_things_classes=4, num_stuff_classes=2),
    test_cfg=dict(
        rcnn=dict(score_thr=0.6, nms=dict(class_agnostic=True)),
        panoptic=dict(mask_overlap=0.5, stuff_area_limit=256),
    ),
)
train_dataloader = dict(
    dataset=dict(
        type='CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_train.json',
        data_prefix=dict(seg='annotations/panoptic_train/'),
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_val.json',
        data_prefix=dict(seg='annotations/panoptic_val/'),
        pipeline=val_pipeline,
    )
)
test_dataloader = dict(dataset=dict(val_dataloader['dataset'], pipeline=_base_.test_pipeline))
val_evaluator = dict(
    _delete_=True,
    type='PanopticQuality',
    ann_file='data/shapes/annotations/panoptic_val.json',
    seg_prefix='data/shapes/annotations/panoptic_val/',
)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='coco_panoptic/PQ', rule='greater'))
