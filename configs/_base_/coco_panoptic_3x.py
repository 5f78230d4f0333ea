# COCO panoptic segmentation, 36 epochs, with the augmentation and optimiser of coco_3x.py.
_base_ = 'coco_3x.py'

_base_.train_pipeline[1] = dict(type='CheckedLoadPanopticAnnotations')
_base_.val_pipeline[2] = dict(type='CheckedLoadPanopticAnnotations')
test_pipeline = [dict(type='LoadImageFromFile'), *_base_.val_pipeline[1:]]

train_dataloader = dict(
    dataset=dict(
        type='CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_train2017.json',
        data_prefix=dict(img='train2017/', seg='annotations/panoptic_train2017/'),
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='CheckedCocoPanopticDataset',
        ann_file='annotations/panoptic_val2017.json',
        data_prefix=dict(img='val2017/', seg='annotations/panoptic_val2017/'),
        pipeline=_base_.val_pipeline,
    )
)
test_dataloader = dict(dataset=dict(val_dataloader['dataset'], pipeline=test_pipeline))
val_evaluator = dict(
    _delete_=True,
    type='PanopticQuality',
    ann_file='data/coco/annotations/panoptic_val2017.json',
    seg_prefix='data/coco/annotations/panoptic_val2017/',
)
test_evaluator = val_evaluator
