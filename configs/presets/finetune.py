# The schedule of `train --preset finetune`, which replaces a config's own: pretrained weights on the user's data.
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs)
# A warm-up of 5 % of the training, then a cosine decay; both scale with the number of iterations.
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
# The heads use the full learning rate, each block of the backbone 0.8 times that of the next; the stem is frozen.
optim_wrapper = dict(constructor='LayerDecayConstructor', paramwise_cfg=dict(layer_decay=0.8), optimizer=dict(lr=1e-4))
model = dict(backbone=dict(frozen_stages=0))
