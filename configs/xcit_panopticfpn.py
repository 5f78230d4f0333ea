# XCiT-S12/16 + PanopticFPN on COCO panoptic, 3x, without conditioning.
_base_ = ['_base_/panoptic-fpn_xcit.py', '_base_/coco_panoptic_3x.py']
