"""tools/compare.py: the comparison of runs measures what pycocotools measures, and refuses what cannot be compared."""

import csv
import json
import shutil

import pytest
from conftest import CONFIG, error_line, run_tool

from spec_mmdet.commands import compare, run


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(compare, 'DRAWS', 50)


@pytest.fixture(scope='module')
def runs(trained, shapes, tmp_path_factory):
    """The trained detector, evaluated, under another seed, and with half of its detections lost."""
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
            (folder / 'report').mkdir(exist_ok=True)
            (folder / 'report' / f'detections.{kind}.json').write_text(json.dumps(found[::kept]))
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
    run('compare', [f'x={runs / "a"}', f'y={runs / "b"}', '--out', str(out)])  # in the place of the one before
    assert 'x: box AP' in capsys.readouterr().out


def test_what_cannot_be_compared(monkeypatch, runs, tmp_path, trained):
    other = tmp_path / 'other'
    shutil.copytree(runs / 'b', other)
    config = other / 'xcit_spec_shapes.py'
    config.write_text(config.read_text().replace('instances_val.json', 'instances_train.json'))
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'text').touch()
    for args, says in (
        ([runs / 'a', runs / 'b'], 'all runs are of one arm'),
        ([f'x={runs / "a"}', f'x={runs / "c"}', f'y={runs / "b"}'], 'with the seed 0'),
        ([f'x={runs / "a"}', tmp_path / 'absent'], 'absent: no such folder'),
        ([f'x={runs / "a"}', f'y={trained}'], '--report'),
        ([f'x={runs / "a"}', f'y={other}'], 'not to be compared'),
        ([f'x={runs / "a"}', f'y={runs / "b"}', '--out', tmp_path / 'full'], 'something other than a comparison'),
    ):
        assert says in error_line(monkeypatch, 'compare', '--out', tmp_path / 'out', *args), says
    assert not (tmp_path / 'out').exists()
