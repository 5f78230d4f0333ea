# A Mask R-CNN on a small conditioned SpecXCiT for images of a few hundred pixels: trains on a CPU in minutes.
_base_ = 'mask-rcnn_xcit.py'

model = dict(
    data_preprocessor=dict(pad_size_divisor=1),
    backbone=dict(
        arch=dict(_delete_=True, dim=96, depth=6, num_heads=4),
        patch_size=8,
        conditioning=dict(type='identity', lam=1.0),
        drop_path_rate=0.0,
        norm_cfg=dict(type='BN'),
    ),
    neck=dict(in_channels=[96] * 4, out_channels=64, num_outs=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
