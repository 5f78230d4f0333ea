"""An exported model computes the same as the conditioned model in PyTorch, for images of any size."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import CONFIG, error_line, run_tool
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from pycocotools.mask import decode
from torch import nn

from spec_mmdet.configs import find_config
from spec_mmdet.inference.inferencer import use_exported
from spec_mmdet.models.onnx import DetectorGraph

LAMBDA = ['--backbone', '--cfg-options', 'model.backbone.conditioning.lam=10.0']


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> Path:
    """Return the shapes config with a backbone of 4 blocks."""
    path = tmp_path_factory.mktemp('config') / 'short.py'
    path.write_text(f'_base_ = {str(CONFIG)!r}\nmodel = dict(backbone=dict(arch=dict(depth=4)))\n')
    return path


@pytest.fixture(scope='module')
def conditioned(tmp_path_factory, config) -> tuple[nn.Module, Path]:
    """The config's backbone (width 96) with lambda = 10 and weights far from initial, and its detector."""
    cfg = Config.fromfile(config)
    cfg.model.backbone.conditioning.lam = 10.0
    torch.manual_seed(1)
    detector = MODELS.build(cfg.model).eval()
    for name, tensor in detector.backbone.state_dict().items():
        if name.endswith(('bias', 'running_mean', 'temperature')):
            tensor += 0.3 * torch.randn_like(tensor)
        elif name.endswith('running_var'):
            tensor *= 0.5 + torch.rand_like(tensor)
    path = tmp_path_factory.mktemp('conditioned') / 'detector.pth'
    torch.save(dict(state_dict=detector.state_dict()), path)
    return detector.backbone, path


def test_exported_backbone_computes_the_same(monkeypatch, config, conditioned, tmp_path):
    backbone, checkpoint = conditioned
    out = tmp_path / 'folder' / 'backbone.onnx'
    run_tool(monkeypatch, 'export', config, checkpoint, out, *LAMBDA)
    assert [path.name for path in out.parent.iterdir()] == ['backbone.onnx']
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    for shape in ((1, 3, 64, 64), (3, 3, 65, 79), (1, 3, 333, 300)):
        x = torch.randn(shape)
        with torch.no_grad():
            expected = backbone(x)
        found = session.run(['stride4', 'stride8', 'stride16', 'stride32'], {'image': x.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-4 * ours.abs().max().item())
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata['mean'] == [123.675, 116.28, 103.53] and metadata['std'] == [58.395, 57.12, 57.375]
    assert metadata['channels'] == 'RGB' and metadata['strides'] == [4, 8, 16, 32]
    assert metadata['conditioning'] == "dict(type='identity', lam=10)"
    assert 'exists already' in error_line(monkeypatch, 'export', config, checkpoint, out, *LAMBDA)


def test_a_wrong_export_is_rejected_and_not_written(monkeypatch, config, conditioned, tmp_path):
    """An export that computes zeros, as this stand-in does, is rejected."""
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path: Path(path).write_text('zeros')
    )
    monkeypatch.setattr(torch.export, 'export', lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: program)

    class Zeros:
        def __init__(self, path, providers):
            assert Path(path).read_text() == 'zeros'

        def run(self, names, inputs):
            n, _, h, w = inputs['image'].shape
            return [np.zeros((n, 96, h // s, w // s), np.float32) for s in (4, 8, 16, 32)]

    monkeypatch.setattr(onnxruntime, 'InferenceSession', Zeros)
    args = [config, conditioned[1], tmp_path / 'backbone.onnx', *LAMBDA]
    assert 'its features differ' in error_line(monkeypatch, 'export', *args)
    assert not list(tmp_path.iterdir())


def test_unusable_inputs(monkeypatch, config, conditioned, trained, tmp_path):
    backbone, checkpoint = conditioned
    whole = trained / 'epoch_1.pth'
    alone = tmp_path / 'without_fpn.pth'
    torch.save({key: value for key, value in backbone.state_dict().items() if not key.startswith('fpn')}, alone)
    out = tmp_path / 'out' / 'backbone.onnx'
    for args, says in (
        (['absent.py', checkpoint, out], 'config absent.py: no such file'),
        ([config, 'absent.pth', out], 'checkpoint absent.pth: no such file'),
        ([config, checkpoint, out.with_suffix('.pt')], 'must end in .onnx'),
        ([config, alone, out, *LAMBDA], 'lacks fpn1'),
        ([config, checkpoint, out], 'made with conditioning'),
        ([config, checkpoint, out, '--backbone'], 'made with conditioning'),
        ([config, checkpoint, out, '--backbone', '--images', out.parent], 'cannot be combined'),
        ([CONFIG, whole, out, '--images', out.parent], 'no such file or folder'),
        ([CONFIG, whole, out, '--cfg-options', 'model.test_cfg.rcnn.nms.type=soft_nms'], 'soft_nms'),
        ([config, checkpoint, out, *LAMBDA, 'model.backbone.arch.depth=7'], 'does not fit'),
        ([config, checkpoint, out, *LAMBDA, 'model.backbone.type=ResNet'], 'has no SpecXCiT'),
    ):
        assert says in error_line(monkeypatch, 'export', *args)
    assert not out.parent.exists()


def small(name: str, **preprocessor) -> Config:
    """Return a shipped config with a backbone of width 32 and a neck of 64 channels."""
    cfg = Config.fromfile(find_config(name))
    cfg.model.data_preprocessor.update(preprocessor)
    cfg.model.backbone.update(arch=dict(dim=32, depth=4, num_heads=2), norm_cfg=dict(type='BN'))
    cfg.model.neck.update(in_channels=[32] * len(cfg.model.neck.in_channels), out_channels=64)
    roi_head = cfg.model.get('roi_head', {})
    for part in ('bbox_head', 'rpn_head'):
        cfg.model.get(part, {}).update(in_channels=64, feat_channels=64)
    for part in ('bbox_roi_extractor', 'mask_roi_extractor'):
        roi_head.get(part, {}).update(out_channels=64)
    roi_head.get('bbox_head', {}).update(in_channels=64, fc_out_channels=64)
    roi_head.get('mask_head', {}).update(in_channels=64, conv_out_channels=64)
    return cfg


def detector(cfg: Config) -> nn.Module:
    """Set weights with which the detector finds objects everywhere."""
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if 'backbone' not in name and name.endswith('weight'):
            parameter.normal_(std=1.4 * parameter[0].numel() ** -0.5)
    return model


@pytest.mark.parametrize(
    'cfg',
    [
        small('xcit_spec_maskrcnn', type='MaskedDataPreprocessor', bgr_to_rgb=False),
        small('xcit_spec_fasterrcnn'),
        small('xcit_spec_retinanet'),
    ],
    ids=lambda cfg: cfg.model.type,
)
def test_the_graph_predicts_the_same_as_the_detector(cfg):
    model = detector(cfg)
    graph = DetectorGraph(model)
    for height, width, size in ((160, 224, (200, 280)), (97, 131, (97, 131)), (240, 161, (80, 50))):
        image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
        sample = DetDataSample(
            metainfo=dict(img_shape=(height, width), ori_shape=size, scale_factor=(width / size[1], height / size[0]))
        )
        expected = model.test_step(dict(inputs=[image[0].flip(0)], data_samples=[sample]))[0].pred_instances
        boxes, scores, labels, *masks = graph(image, torch.tensor(size), torch.tensor(0.05))
        assert len(expected) == len(boxes) > 50
        # If two scores are nearly equal, rounding may exchange them.
        same = (labels == expected.labels) & ((boxes - expected.bboxes).abs().amax(dim=1) < 0.05)
        assert same.float().mean() > 0.9
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-3)
        if masks:
            assert masks[0].shape == expected.masks.shape
            assert (masks[0] == expected.masks)[same].float().mean() > 0.999 and masks[0].any()


def test_padding_is_removed_for_exported_detectors(capsys):
    cfg = Config.fromfile(CONFIG)
    pipeline = list(cfg.test_dataloader.dataset.pipeline)
    cfg.test_dataloader.dataset.pipeline = [*pipeline[:2], dict(type='mmdet.Pad', size=(256, 256)), *pipeline[2:]]
    use_exported(cfg, 'detector.onnx')
    assert list(cfg.test_dataloader.dataset.pipeline) == pipeline
    assert 'test_dataloader.dataset.pipeline: padding removed' in capsys.readouterr().out


def test_whole_detector_runs_elsewhere(monkeypatch, trained, shapes, tmp_path, capsys):
    """The exported file and the checkpoint give the same predictions."""
    detector, config, out = trained / 'epoch_1.pth', trained / 'xcit_spec_shapes.py', tmp_path / 'detector.onnx'
    run_tool(monkeypatch, 'export', config, detector, out, '--images', shapes / 'val' / '000001.png')
    printed = capsys.readouterr().out
    assert printed.count('.png') == 1 and printed.count('noise') == 2 and 'conditioning: dict' in printed
    for name, model in (('torch', detector), ('onnx', out)):
        run_tool(
            monkeypatch,
            'predict',
            config,
            model,
            f'{shapes}/val/00000[1-4].png',
            '--score',
            0.1,
            '--out',
            tmp_path / name,
        )
    assert (tmp_path / 'onnx' / '000001.png').is_file()
    expected, found = (json.loads((tmp_path / name / 'predictions.json').read_text()) for name in ('torch', 'onnx'))
    assert len(expected) == len(found) > 5
    for ours, theirs in zip(found, expected):
        assert (ours['image_id'], ours['category_id']) == (theirs['image_id'], theirs['category_id'])
        np.testing.assert_allclose([*ours['bbox'], ours['score']], [*theirs['bbox'], theirs['score']], atol=1e-3)
        assert (decode(ours['segmentation']) != decode(theirs['segmentation'])).sum() <= 2
    padded = tmp_path / 'padded.py'  # the reported case predict_onnx_pad
    pipeline = Config.fromfile(config).test_dataloader.dataset.pipeline
    pipeline.insert(2, dict(type='mmdet.Pad', size=(192, 160)))
    padded.write_text(f"_base_ = '{config}'\ntest_dataloader = dict(dataset=dict(pipeline={pipeline}))")
    args = [f'{shapes}/val/00000[1-4].png', '--score', 0.1, '--no-pictures', '--out', tmp_path / 'padded']
    run_tool(monkeypatch, 'predict', padded, out, *args)
    assert json.loads((tmp_path / 'padded' / 'predictions.json').read_text()) == found
    assert 'padding removed' in capsys.readouterr().out
    *_, last = csv.DictReader((trained / 'results.csv').open())
    run_tool(monkeypatch, 'test', config, out, '--data', shapes, '--work-dir', tmp_path / 'test')
    printed = capsys.readouterr().out
    for kind in ('bbox', 'segm'):  # of PyTorch, at the end of the training
        ap = re.search(rf'^{dict(bbox="box", segm="mask")[kind]} AP +(\S+) +(\S+)', printed, re.MULTILINE).groups()
        expected = [float(last[f'coco/{kind}_{name}']) for name in ('mAP', 'mAP_50')]
        np.testing.assert_allclose([*map(float, ap)], expected, atol=2e-3)
    assert expected[1] > 0
    out.write_bytes(b'text')
    refusal = error_line(monkeypatch, 'predict', config, out, shapes / 'val', '--out', tmp_path / 'none')
    assert 'detector.onnx: ONNX Runtime cannot read it' in refusal and not (tmp_path / 'none').exists()
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in 'xy']
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['y'])], 'other', value[:1], value[1:])
    other = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid('', 17)])
    onnx.helper.set_model_props(other, dict(names="{0: 'person'}"))  # not JSON
    onnx.save(other, out)
    assert 'detector.onnx: not a detector' in error_line(monkeypatch, 'predict', config, out, shapes / 'val')
