# XCiT-M24/16 + Semantic FPN on ADE20K, 80k iterations, with spectrally conditioned attention.
_base_ = 'xcit_medium_24_p16_semanticfpn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
