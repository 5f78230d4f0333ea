# PanopticFPN on a SpecXCiT backbone: MMDetection's, whose complete config has a data set and a runtime of its own.
_base_ = 'mask-rcnn_xcit.py'

model = dict(
    type='PanopticFPN',
    data_preprocessor=dict(pad_seg=True, mask_pad_value=0, seg_pad_value=255),
    semantic_head=dict(
        type='PanopticFPNHead',
        num_things_classes=80,
        num_stuff_classes=53,
        in_channels=256,
        inner_channels=128,
        start_level=0,
        end_level=4,
        norm_cfg=dict(type='GN', num_groups=32),
        loss_seg=dict(type='CrossEntropyLoss', ignore_index=255, loss_weight=0.5),
    ),
    panoptic_fusion_head=dict(type='HeuristicFusionHead', num_things_classes=80, num_stuff_classes=53),
    test_cfg=dict(
        rcnn=dict(score_thr=0.6, nms=dict(class_agnostic=True)),
        panoptic=dict(mask_overlap=0.5, stuff_area_limit=4096),
    ),
)
default_hooks = dict(checkpoint=dict(save_best='coco_panoptic/PQ', rule='greater'))
