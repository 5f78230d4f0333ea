# What `train --preset finetune` puts in the place of a config's schedule: pretrained weights on data of one's own.
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
# A warm-up of 5 % of the training, then half a cosine: both as long as the training is, however few its iterations.
param_scheduler = [
    dict(type='WarmUpLR', start_factor=0.01, by_epoch=True, convert_to_iter_based=True, begin=0, end=0.05 * max_epochs),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=0.01,
        by_epoch=True,
        convert_to_iter_based=True,
        begin=0,
        end=max_epochs,
    ),
]
# The heads learn at the full rate, each block of the backbone at 0.8 times that of the next, the stem not at all.
optim_wrapper = dict(constructor='LayerDecayConstructor', paramwise_cfg=dict(layer_decay=0.8), optimizer=dict(lr=1e-4))
model = dict(backbone=dict(frozen_stages=0))
