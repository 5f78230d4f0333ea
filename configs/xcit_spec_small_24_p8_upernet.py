# XCiT-S24/8 + UperNet on ADE20K, 160k iterations, with spectrally conditioned attention.
_base_ = 'xcit_small_24_p8_upernet.py'

model = dict(backbone=dict(conditioning=dict(type='identity', lam=10.0)))
