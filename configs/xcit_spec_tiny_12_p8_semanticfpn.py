# XCiT-T12/8 + Semantic FPN on ADE20K, 80k iterations, with spectrally conditioned attention.
_base_ = 'xcit_tiny_12_p8_semanticfpn.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
