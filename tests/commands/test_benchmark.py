"""The benchmark compares models that compute the same, and says what it measured."""

import json

import pytest
import torch
from conftest import run_tool

from spec_mmdet.commands.benchmark import build_backbone


def test_all_backbones_have_the_same_output():
    images = torch.randn(1, 3, 96, 128)
    outputs = {}
    for name in ('ours', 'timm', 'plain form', 'identity'):
        with torch.no_grad():
            out = build_backbone(name, 'nano_12', 16).eval()(images)
        outputs[name] = out.flatten(2).transpose(1, 2) if out.ndim == 4 else out
    for name in ('timm', 'plain form'):
        torch.testing.assert_close(outputs[name], outputs['ours'], rtol=1e-4, atol=1e-4)
    assert (outputs['identity'] - outputs['ours']).abs().max() > 0.1


@pytest.mark.parametrize('arguments', [['--models', 'timm', 'ours'], ['--detector']])
def test_it_writes_what_it_measured(monkeypatch, tmp_path, capsys, arguments):
    arguments += ['--arch', 'nano_12', '--sizes', '64x64', '96x64', '--rounds', '1', '--no-memory']
    run_tool(monkeypatch, 'benchmark', *arguments, '--out', tmp_path)
    rows = json.loads((tmp_path / 'benchmark.json').read_text())['rows']
    assert [(row['height'], row['training_ratio']) for row in rows[::2]] == [(64, 1.0), (96, 1.0)]
    assert all(row['inference_s'] > 0 and row['training_s'] > 0 for row in rows)
    assert 'ratios to' in capsys.readouterr().out and (tmp_path / 'benchmark.png').exists()
