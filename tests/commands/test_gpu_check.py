"""gpu-check runs on the CPU at a small size, and writes down what fails."""

import json

import pytest
import torch

from spec_mmdet import InputError
from spec_mmdet.commands import gpu_check


def test_all_parts_run_on_the_cpu(tmp_path, monkeypatch):
    def wrong(args):
        yield dict(seen=1)
        gpu_check.require(False, 'as it should')

    monkeypatch.setitem(gpu_check.PARTS, 'wrong', wrong)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(['--device', 'cpu', '--out', str(tmp_path)])
    assert ended.value.code == 1
    parts = json.loads((tmp_path / 'gpu_check.json').read_text())['parts']
    assert {name: part['failed'] for name, part in parts.items() if part['failed'] and name != 'wrong'} == {}
    assert all(part['rows'] for part in parts.values())
    assert parts['wrong']['failed'].startswith('AssertionError: as it should (')
    assert '## wrong\n\n**failed**: AssertionError' in (tmp_path / 'gpu_check.md').read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match='no GPU here'):
        gpu_check.main([])
