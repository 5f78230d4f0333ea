# XCiT-S12/16 + PanopticFPN on COCO panoptic, 3x, with spectrally conditioned attention with lambda = 10.
_base_ = 'xcit_panopticfpn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
