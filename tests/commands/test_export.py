"""tools/export.py: the exported backbone computes what the conditioned one does in PyTorch, for images of any size."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import CONFIG, complaint, run_tool
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

LAMBDA = ['--cfg-options', 'model.backbone.conditioning.lam=10.0']


@pytest.fixture(scope='module')
def conditioned(tmp_path_factory) -> tuple[nn.Module, Path]:
    """The shapes config's backbone (96 wide, 6 blocks) with lambda = 10 and weights far from initial; its detector."""
    cfg = Config.fromfile(CONFIG)
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


def test_exported_backbone_computes_the_same(monkeypatch, conditioned, tmp_path):
    backbone, checkpoint = conditioned
    out = tmp_path / 'folder' / 'backbone.onnx'
    run_tool(monkeypatch, 'export', CONFIG, checkpoint, out, *LAMBDA)
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
    assert 'is there already' in complaint(monkeypatch, 'export', CONFIG, checkpoint, out, *LAMBDA)


def test_other_features_are_not_left_behind(monkeypatch, conditioned, tmp_path):
    """An export that computes zeros, as its stand-in does, is refused."""
    program = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path: Path(path).write_text('zeros')
    )
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: program)

    class Zeros:
        def __init__(self, path, providers):
            assert Path(path).read_text() == 'zeros'

        def run(self, names, inputs):
            n, _, h, w = inputs['image'].shape
            return [np.zeros((n, 96, h // s, w // s), np.float32) for s in (4, 8, 16, 32)]

    monkeypatch.setattr(onnxruntime, 'InferenceSession', Zeros)
    args = [CONFIG, conditioned[1], tmp_path / 'backbone.onnx', *LAMBDA]
    assert 'it does not compute what the backbone does' in complaint(monkeypatch, 'export', *args)
    assert not list(tmp_path.iterdir())


def test_unusable_inputs(monkeypatch, conditioned, tmp_path):
    backbone, checkpoint = conditioned
    alone = tmp_path / 'without_fpn.pth'
    torch.save({key: value for key, value in backbone.state_dict().items() if not key.startswith('fpn')}, alone)
    out = tmp_path / 'out' / 'backbone.onnx'
    for args, says in (
        (['absent.py', checkpoint, out], 'config absent.py: no such file'),
        ([CONFIG, 'absent.pth', out], 'checkpoint absent.pth: no such file'),
        ([CONFIG, checkpoint, out.with_suffix('.pt')], 'must end in .onnx'),
        ([CONFIG, alone, out, *LAMBDA], 'lacks fpn1'),
        ([CONFIG, checkpoint, out], 'made with conditioning'),
        ([CONFIG, checkpoint, out, *LAMBDA, 'model.backbone.arch.depth=7'], 'is of another XCiT'),
        ([CONFIG, checkpoint, out, '--cfg-options', 'model.backbone.type=ResNet'], 'has no SpecXCiT'),
    ):
        assert says in complaint(monkeypatch, 'export', *args)
    assert not out.parent.exists()
