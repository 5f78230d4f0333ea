"""gpu-check, with the parts of benchmarks/gpu.py, runs on the CPU at a small size, records what fails and goes on."""

import csv
import json
import time

import pytest
import torch

from benchmarks.gpu import MORE
from spec_mmdet import InputError
from spec_mmdet.commands import gpu_check
from spec_mmdet.training import gpu_checks


def test_all_parts_run_on_the_cpu_and_failures_are_recorded(tmp_path, monkeypatch):
    def wrong(check):
        yield dict(operator='first', value=0.5, passed=False)
        yield dict(operator='second', value=0.25, passed=True)
        yield dict(operator='third', value=0.125, passed=False)
        raise RuntimeError('no more\nand a second line')

    for name, part in dict(MORE, wrong=(10, wrong)).items():
        monkeypatch.setitem(gpu_checks.PARTS, name, part)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(['--device', 'cpu', '--out', str(tmp_path)])
    assert ended.value.code == 1
    parts = json.loads((tmp_path / 'gpu_check.json').read_text())['parts']
    assert {name: part['failed'] for name, part in parts.items() if part['failed'] and name != 'wrong'} == {}
    assert all(part['rows'] for part in parts.values())
    assert [row['operator'] for row in parts['wrong']['rows']] == ['first', 'second', 'third']
    faults = parts['wrong']['failed'].split('; ')
    assert faults[:2] == ['operator first, value 0.5', 'operator third, value 0.125']
    assert faults[2].startswith('RuntimeError: no more (')
    assert '## wrong\n\n**failed**: operator first' in (tmp_path / 'gpu_check.md').read_text()
    table = [*csv.DictReader((tmp_path / 'gpu_check.csv').open())]
    device = table[0]['device']
    assert dict(device=device, part='wrong', case='second', quantity='value', value='0.25') in table
    assert device and {row['part'] for row in table} == parts.keys()


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    def endless(check):
        yield dict(value=1.0)
        while True:
            time.sleep(0.01)

    rows, failed = gpu_checks.run_part(endless, gpu_checks.GpuCheck('cpu', tmp_path), 0.2)
    assert rows == [dict(value=1.0)] and failed.startswith('TimeoutError')
    assert sum(seconds for seconds, _ in (gpu_checks.PARTS | MORE).values()) <= 6 * 60


def test_tf32_is_off_only_in_comparisons(tmp_path):
    flags = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in flags]

    @gpu_checks.disable_tf32
    def part(check):
        yield dict(tf32=[each.allow_tf32 for each in flags])
        raise RuntimeError

    rows, failed = gpu_checks.run_part(part, gpu_checks.GpuCheck('cpu', tmp_path))
    assert rows == [dict(tf32=[False, False])] and failed.startswith('RuntimeError')
    assert [each.allow_tf32 for each in flags] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so():
    with pytest.raises(InputError, match='--device cuda'):
        gpu_check.main([])
