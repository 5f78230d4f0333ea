"""Benchmark models that compute the same, and check the reported measurements."""

import json
import re

import pytest
import torch
from conftest import error_line, run_tool
from pycocotools.coco import COCO

from benchmarks import coco_scale
from spec_mmdet.training.speed import build_backbone, count_operations


def test_all_backbones_have_the_same_output():
    images = torch.randn(1, 3, 96, 128)
    outputs = {}
    for name in ('ours', 'timm', 'plain-form', 'identity'):
        with torch.no_grad():
            out = build_backbone(name, 'nano_12', 16).eval()(images)
        outputs[name] = out.flatten(2).transpose(1, 2) if out.ndim == 4 else out
    for name in ('timm', 'plain-form'):
        torch.testing.assert_close(outputs[name], outputs['ours'], rtol=1e-4, atol=1e-4)
    assert (outputs['identity'] - outputs['ours']).abs().max() > 0.1


@pytest.mark.parametrize('groups', [1, 6])
@pytest.mark.parametrize('kind', [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_operations_of_convolutions_are_counted(kind, groups):
    module, x = kind(6, 12, 2, 2, groups=groups), torch.randn(3, 6, 8, 10, requires_grad=True)
    places = 3 * 4 * 5 if kind is torch.nn.Conv2d else 3 * 8 * 10  # each model uses every weight once
    forward = 2 * places * module.weight.numel()
    assert count_operations(lambda: module(x)) == forward
    assert count_operations(lambda: module(x).sum().backward()) == 3 * forward


def measured(monkeypatch, folder, *arguments):
    monkeypatch.chdir(folder)
    run_tool(monkeypatch, 'benchmark', *arguments, '--arch', 'nano_12', '--rounds', 1, '--no-memory', '--out', 'out')
    return json.loads((folder / 'out' / 'benchmark.json').read_text())['rows']


def test_measurements_are_written(monkeypatch, tmp_path, capsys):
    rows = measured(monkeypatch, tmp_path, '--models', 'timm', 'ours', 'resnet-50', '--sizes', '64x64', '96x64')
    assert [(row['height'], row['training_ratio']) for row in rows[::3]] == [(64, 1.0), (96, 1.0)]
    assert all(row['inference_s'] > 0 and row['training_share'] > 0 for row in rows)
    assert 'ratios to timm' in capsys.readouterr().out and rows[0]['matrix_rate'] > 0


def test_whole_detectors(monkeypatch, tmp_path):
    (row,) = measured(monkeypatch, tmp_path, '--detector', '--models', 'ours', '--sizes', '64x64')
    assert row['inference_s'] > 0 and row['training_multiply_adds'] > 2 * row['inference_multiply_adds']


def test_loading_is_timed_by_steps(monkeypatch, tmp_path, capsys, shapes):
    run_tool(monkeypatch, 'benchmarks.loading', shapes)
    shown = capsys.readouterr().out
    assert float(re.search(r'([\d.]+) images per second', shown)[1]) > 0 and '| CheckedLoadImageFromFile | ' in shown


def test_data_of_cocos_shape_and_its_table(coco_mini, tmp_path, capsys):
    coco_scale.build_data(coco_mini, tmp_path / 'data', 0.003)
    for split, images, annotations in (('train', 355, 2580), ('val', 15, 110)):
        coco = json.loads((tmp_path / f'data/annotations/instances_{split}2017.json').read_bytes())
        assert (len(coco['images']), len(coco['annotations'])) == (images, annotations)
        for key in ('images', 'annotations'):
            assert [entry['id'] for entry in coco[key]] == list(range(1, len(coco[key]) + 1))
        assert all((tmp_path / f'data/{split}2017' / image['file_name']).is_file() for image in coco['images'])
        of_source = COCO(str(coco_mini / f'annotations/instances_{split}2017.json'))
        polygons = {str(annotation['segmentation']) for annotation in of_source.anns.values()}
        assert {str(annotation['segmentation']) for annotation in coco['annotations']} <= polygons

    rows = [dict.fromkeys(coco_scale.COLUMNS, '') | dict(part='train', processes='1', workers='4', arm=arm,
            fraction=fraction, main_s=seconds) for arm, fraction, seconds in
            (('plain', '0.25', '10'), ('plain', '1', '25'), ('ours', '0.25', '12'), ('ours', '1', '30'))]  # fmt: skip
    capsys.readouterr()
    coco_scale.print_table(rows)
    lines = [line.split(' | ')[3:7] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [['0.25', '12.0', '1.20', ''], ['1', '30.0', '1.20', '24'],
                     ['0.25', '10.0', '1.00', ''], ['1', '25.0', '1.00', '20']]  # fmt: skip


def test_unknown_models_and_sizes(monkeypatch, tmp_path):
    for arguments, says in (
        (['--models', 'timmy'], 'timmy'),
        (['--detector', '--models', 'timm'], 'timm'),
        (['--arch', 'small_13'], 'small_13'),
        (['--sizes', '640'], 'HEIGHTxWIDTH'),
    ):
        assert says in error_line(monkeypatch, 'benchmark', *arguments, '--out', tmp_path)
