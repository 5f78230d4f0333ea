# XCiT-S24/8 + Semantic FPN on ADE20K, 80k iterations, with spectrally conditioned attention.
_base_ = 'xcit_small_24_p8_semanticfpn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
