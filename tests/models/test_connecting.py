"""Test that MMDetection's detectors read SpecXCiT's maps with a config of two lines."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs

from spec_mmdet.configs import read_config
from spec_mmdet.errors import InputError
from spec_mmdet.models.connecting import connect_backbone
from spec_mmdet.models.onnx import DetectorGraph
from spec_mmdet.models.xcit import SpecXCiT

TINY = dict(dim=32, depth=4, num_heads=4)


def load(tmp_path, base, **backbone):
    path = tmp_path / 'config.py'
    backbone = dict(_delete_=True, type='SpecXCiT', arch=TINY) | backbone
    path.write_text(f'_base_ = {f"mmdet::{base}.py"!r}\nmodel = dict(backbone={backbone!r})\n')
    return read_config(path).model


@pytest.mark.parametrize(
    ('base', 'strides'),
    [
        ('retinanet/retinanet_r50_fpn_1x_coco', (8, 16, 32)),  # its FPN skips the map of stride 4
        ('yolof/yolof_r50-c5_8xb8-1x_coco', (32,)),
        ('rtmdet/rtmdet_tiny_8xb32-300e_coco', (8, 16, 32)),
        ('dyhead/atss_r50_fpn_dyhead_1x_coco', (8, 16, 32)),  # a list of necks
        ('centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco', (32,)),  # a head that needs contiguous maps
    ],
)
def test_detectors_train_all_parameters(tmp_path, base, strides):
    """Losses are finite, and each parameter gets a gradient, as distributed training requires."""
    cfg = load(tmp_path, base)
    changes = connect_backbone(cfg)
    assert any('in_channels' in change for change in changes) and not connect_backbone(cfg)
    model = MODELS.build(cfg).train()
    maps = model.backbone(torch.zeros(1, 3, 128, 96))
    assert [(128 / m.shape[2], 96 / m.shape[3], m.shape[1]) for m in maps] == [(s, s, 32) for s in strides]
    batch = model.data_preprocessor(demo_mm_inputs(2, [[3, 128, 128]] * 2), training=True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    model.eval().predict(batch['inputs'], batch['data_samples'])
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


class OwnXCiT(SpecXCiT):
    pass


@pytest.mark.parametrize('kind', ['SpecXCiT', 'mmdet.SpecXCiT', OwnXCiT])
def test_a_head_without_neck_is_fitted(tmp_path, kind):
    cfg = load(tmp_path, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco', arch='tiny_12')
    cfg.backbone.type = kind
    assert connect_backbone(cfg) == ['model.panoptic_head.in_channels=[192, 192, 192, 192]']


@pytest.mark.parametrize(
    ('base', 'says'),
    [
        ('ssd/ssd300_coco', 'SSDNeck reads 2 maps'),
        ('tridentnet/tridentnet_r50-caffe_1x_coco', 'TridentFasterRCNN has neither a neck'),
        ('detectors/detectors_cascade-rcnn_r50_1x_coco', 'RFP has a backbone of its own'),
    ],
)
def test_detectors_that_cannot_read_the_maps_are_rejected(tmp_path, base, says):
    with pytest.raises(InputError, match=says):
        connect_backbone(load(tmp_path, base))


@pytest.mark.parametrize(
    'base, part',
    [
        ('sabl/sabl-retinanet_r50_fpn_1x_coco', 'SABLRetinaHead'),  # has no prior_generator, unlike RetinaHead
        ('pafpn/faster-rcnn_r50_pafpn_1x_coco', 'PAFPN'),
    ],
)
def test_parts_that_cannot_be_exported_are_named(tmp_path, base, part):
    cfg = load(tmp_path, base)
    connect_backbone(cfg)
    with pytest.raises(ValueError, match=f'{part} cannot be exported'):
        DetectorGraph(MODELS.build(cfg))


def test_stated_strides_must_fit(tmp_path):
    base = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco'
    with pytest.raises(InputError, match='out_strides has 3 strides'):
        connect_backbone(load(tmp_path, base, out_strides=(8, 16, 32)))
    with pytest.raises(ValueError, match='out_strides must be'):
        SpecXCiT(TINY, out_strides=(32, 8))
    with pytest.raises(ValueError, match='out_indices must be 2 rising'):
        SpecXCiT(TINY, out_strides=(8, 32), out_indices=(0, 1, 2))


def test_fewer_maps_are_those_of_the_whole_pyramid():
    torch.manual_seed(0)
    whole = SpecXCiT(TINY).eval()
    part = SpecXCiT(TINY, out_strides=(8, 32)).eval()
    left = part.load_state_dict(whole.state_dict(), strict=False)
    assert not left.missing_keys and {key.split('.')[0] for key in left.unexpected_keys} == {'fpn1'}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = whole(x)
        for ours, theirs in zip(part(x), (expected[1], expected[3]), strict=True):
            torch.testing.assert_close(ours, theirs)
