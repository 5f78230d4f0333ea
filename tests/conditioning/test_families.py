"""Test a few families of docs/results/attention.csv, each of a different kind; families.py runs all of them."""

import csv
import sys
from pathlib import Path

import pytest
import timm
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from families import TABLE, TIMM, TRANSFORMERS, examine

ROWS = [f'| {" | ".join(row)} |' for row in csv.reader(TABLE.read_text().splitlines())]
PAGE = Path(__file__).parents[2] / 'docs' / 'method' / 'attention.md'
FEW = """
test_vit tiny_vit_5m_224 levit_128s mobilevitv2_050 test_maxvit bert bloom codegen convbert deberta distilbert falcon
gpt2 gpt_neox longformer minimax phi3 qwen3_next squeezebert t5 wavlm xlnet
"""


def versions() -> str:
    return f'timm {timm.__version__} and transformers {transformers.__version__}'


@pytest.mark.parametrize('name', FEW.split())
def test_a_family_is_right_or_says_that_it_is_not(name):
    if name in TRANSFORMERS and name.replace('-', '_') not in transformers.models.__dir__():
        pytest.skip(f'transformers {transformers.__version__} has no {name}')
    line = str(examine(name))
    if versions() in PAGE.read_text():
        assert line in ROWS, f'run python tests/conditioning/families.py: {line}'


def test_the_table_has_every_family():
    assert [row.split(' | ')[0].removeprefix('| ') for row in ROWS[1:]] == [*TIMM, *TRANSFORMERS]
    assert len(TIMM) >= 70 and len(TRANSFORMERS) >= 60
