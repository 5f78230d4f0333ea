"""The comparison of runs agrees with pycocotools and rejects runs that cannot be compared."""

import csv
import json
import shutil

import pytest
from conftest import CONFIG, error_line, run_tool

from spec_mmdet.commands import run
from spec_mmdet.evaluation import comparison
from spec_mmdet.evaluation.pages import record_data


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(comparison, 'DRAWS', 50)


@pytest.fixture(scope='module')
def runs(trained, shapes, tmp_path_factory):
    """Evaluate the trained detector, under another seed, and without the best half of its detections."""
    root = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ['--data', shapes, '--work-dir', root / 'logs', '--report', root / 'report']
        run_tool(monkeypatch, 'test', CONFIG, trained / 'epoch_1.pth', *arguments)
    for name, seed, kept in (('a', 0, 1), ('b', 1, 1), ('c', 0, 2)):
        folder = root / name
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns('*.pth'))
        facts = json.loads((folder / 'run.json').read_text())
        (folder / 'run.json').write_text(json.dumps(dict(facts, seed=seed)))
        for kind in ('bbox', 'segm'):
            found = json.loads((root / 'report' / f'detections.{kind}.json').read_text())
            for detection in found:
                detection['score'] *= 1 - 0.1 * seed
            (folder / 'report').mkdir(exist_ok=True)
            (folder / 'report' / f'detections.{kind}.json').write_text(
                json.dumps(sorted(found, key=lambda d: d['score'])[: len(found) // kept])
            )
        record = json.loads((root / 'report' / 'data.json').read_text())
        record['weights'].update(sha256=name, seed=seed)
        (folder / 'report' / 'data.json').write_text(json.dumps(record))
    return root


def test_a_table_and_a_page(runs, tmp_path, capsys):
    out = tmp_path / 'out'
    run('compare', [f'whole={runs / "a"}', f'half={runs / "c"}', f'whole={runs / "b"}', '--out', str(out)])
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((out / 'runs.csv').open()))
    (reported,) = (json.loads(path.read_text()) for path in (runs / 'logs').glob('*/*.json'))
    for kind, name in (('bbox', 'box AP'), ('segm', 'mask AP')):
        assert float(rows[0][name]) == pytest.approx(reported[f'coco/{kind}_mAP'], abs=6e-4)
        assert float(rows[1][name]) < float(rows[0][name])
    assert [row['seed'] for row in rows] == ['0', '0', '1'] and rows[0]['kappa_J'] != '–'
    differences = list(csv.DictReader((out / 'differences.csv').open()))
    assert [(row['arm'], row['kind'], row['paired']) for row in differences] == [
        ('half', 'box', 'False'), ('half', 'mask', 'False')
    ]  # fmt: skip
    page = (out / 'index.html').read_text()
    assert (
        page.count('data:image/png') >= 3 and 'half - whole: box AP -' in page and 'half - whole: box AP -' in printed
    )
    run('compare', [f'x={runs / "a"}', f'y={runs / "b"}', '--out', str(out)])  # replaces the previous one
    assert 'x: box AP' in capsys.readouterr().out


def test_runs_that_cannot_be_compared(monkeypatch, runs, tmp_path, trained, shapes):
    copies = [tmp_path / name for name in ('copy', 'reseeded', 'recorded', 'changed', 'other', 'unrecorded', 'mixed')]
    for folder in copies:
        shutil.copytree(runs / 'a', folder)
    copy, reseeded, recorded, changed, other, unrecorded, mixed = copies
    weights = dict(sha256='a', seed=None)
    for folder in (reseeded, mixed):
        (folder / 'run.json').write_text(json.dumps(dict(seed=5, started='then')))
    reseeded_record = json.loads((runs / 'a' / 'report' / 'data.json').read_text())
    (reseeded / 'report' / 'data.json').write_text(json.dumps(dict(reseeded_record, weights=weights)))
    record_data(other / 'report', shapes / 'annotations' / 'instances_train.json', reseeded_record['classes'], weights)
    (unrecorded / 'report' / 'data.json').unlink()
    records = {}
    for folder in (recorded, changed):
        records[folder] = folder / 'annotations.json'
        shutil.copy(shapes / 'annotations' / 'instances_val.json', records[folder])
        content = json.loads(records[folder].read_text())
        content['annotations'].pop()
        records[folder].write_text(json.dumps(content))
        record_data(folder / 'report', records[folder], ['circle'], weights)
    records[changed].write_text(json.dumps(dict(content, info=dict(year=2026))))
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'text').touch()
    for args, says in (
        ([runs / 'a', runs / 'b'], 'one arm'),
        ([f'x={runs / "a"}', f'x={runs / "c"}', f'y={runs / "b"}'], 'with the seed 0'),
        ([f'x={runs / "a"}', tmp_path / 'absent'], 'absent: no such folder'),
        ([f'x={runs / "a"}', f'y={trained}'], '--report'),
        ([f'x={runs / "a"}', f'y={other}'], 'instances_train.json'),
        ([f'x={runs / "a"}', f'y={unrecorded}'], 'contains no report'),
        ([f'x={runs / "a"}', f'y={mixed}'], 'training with the seed 0'),
        ([f'x={runs / "a"}', f'x={copy}', f'y={runs / "b"}'], 'copies of one run'),
        ([f'x={runs / "a"}', f'x={reseeded}', f'y={runs / "b"}'], 'copies of one run'),
        ([f'x={runs / "b"}', f'y={recorded}'], 'different classes'),
        ([f'x={runs / "b"}', f'y={changed}'], 'has changed'),
        ([f'x={runs / "a"}', f'y={runs / "b"}', '--out', tmp_path / 'full'], 'other than a comparison'),
    ):
        assert says in error_line(monkeypatch, 'compare', '--out', tmp_path / 'out', *args), says
    assert not (tmp_path / 'out').exists()
