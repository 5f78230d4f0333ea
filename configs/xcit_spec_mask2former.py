# XCiT-S12/16 + Mask2Former on COCO panoptic, with spectrally conditioned attention with lambda = 10 as in the paper.
_base_ = 'xcit_mask2former.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
