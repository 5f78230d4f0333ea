"""Test a few of the families of docs/results/operators.csv, one for each operator; zoo.py runs all of them."""

import csv
import sys
from pathlib import Path

import mmcv._ext
import mmcv.ops.multi_scale_deform_attn as deform_attn
import mmdet
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import zoo


@pytest.fixture(autouse=True)
def recording_ends(monkeypatch):
    monkeypatch.setattr(
        deform_attn, 'multi_scale_deformable_attn_pytorch', deform_attn.multi_scale_deformable_attn_pytorch
    )
    for name, operator in zoo.OPERATORS.items():
        monkeypatch.setattr(mmcv._ext, name, operator)


TABLE = [f'| {" | ".join(row)} |' for row in csv.reader(zoo.TABLE.read_text().splitlines())]
of_the_table = f'mmdet {mmdet.__version__},' in zoo.TABLE.with_name('operators.md').read_text()


@pytest.mark.parametrize('family', ['centernet', 'dcn', 'deformable_detr', 'guided_anchoring'])
def test_a_family_trains_and_predicts(family):
    line = zoo.examine(family)
    assert line.count(' | yes') == 2
    if of_the_table:
        assert line in TABLE, f'run python tests/ops/zoo.py: {line}'


@pytest.mark.skipif(not of_the_table, reason='the table is of another version of MMDetection')
def test_every_family_is_in_the_table():
    assert [row.split(' | ')[0].removeprefix('| ') for row in TABLE[1:]] == zoo.families()
