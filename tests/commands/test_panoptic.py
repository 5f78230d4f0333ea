"""A tiny PanopticFPN through the commands: train, test with a report, predict; and what they reject."""

import json
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import CHECK, error_line, in_processes, read_metrics, run_tool

from spec_mmdet.data import shapes
from spec_mmdet.data.panoptic import read_ids
from spec_mmdet.evaluation.panoptic import Segments, average, count_matches, measure_quality
from spec_mmdet.training.results import read_curves, read_scalars

CONFIG = 'xcit_spec_panoptic_shapes'
OPTIONS = ['model.test_cfg.panoptic.stuff_area_limit=0']  # in a small image


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('panoptic')
    shapes.write_shapes(root / 'data', train=16, val=5, size=64, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        run_tool(patch, 'train', CONFIG, '--data', root / 'data', '--work-dir', root / 'work', '--epochs', 1,
                 '--batch-size', 2, '--image-size', 64, '--cfg-options', *OPTIONS)  # fmt: skip
    return root


def measure(root: Path, pngs: Path, entries: list[dict]) -> np.ndarray:
    """Return the mean PQ, SQ and RQ in percent of predictions in COCO's format."""
    truth = json.loads((root / 'data' / 'annotations' / 'panoptic_val.json').read_text())
    label_of, counts = {i: i - 1 for i in range(1, 7)}, 0
    for annotation, entry in zip(truth['annotations'], entries, strict=True):
        sides = (
            Segments.from_ids(read_ids(folder / e['file_name']), e['segments_info'], label_of)
            for folder, e in ((root / 'data' / 'annotations' / 'panoptic_val', annotation), (pngs, entry))
        )
        counts = counts + count_matches(*sides, 6)
    return 100 * average(measure_quality(counts))


def test_training_records_pq(work):
    run = work / 'work'
    assert (run / 'best_coco_panoptic_PQ_epoch_1.pth').is_file() and (run / 'train_batch_1.jpg').is_file()
    (last,) = (entry for entry in read_scalars(run) if 'coco_panoptic/PQ' in entry)
    assert read_curves(run)['PQ'][1] == [last['coco_panoptic/PQ']] and last['coco_panoptic/PQ'] > 0
    assert 'coco_panoptic/PQ_st' in (run / 'results.csv').read_text().splitlines()[0]
    digests = json.loads((run / 'run.json').read_text())['data']
    assert [Path(path).name for path in digests['val']] == ['panoptic_val.json']


def test_the_report_and_the_predictions(work, monkeypatch, tmp_path):
    run = work / 'work'
    args = run / f'{CONFIG}.py', run / 'epoch_1.pth'
    run_tool(monkeypatch, 'test', *args, '--work-dir', tmp_path / 'test', '--report', tmp_path / 'report')
    tested = read_metrics(tmp_path / 'test')
    written = json.loads((tmp_path / 'report' / 'predictions.panoptic.json').read_text())['annotations']
    quality = measure(work, tmp_path / 'report' / 'predictions.panoptic', written)
    assert quality.tolist() == pytest.approx([tested[f'coco_panoptic/{kind}'] for kind in ('PQ', 'SQ', 'RQ')])
    page = (tmp_path / 'report' / 'index.html').read_text('utf-8')
    assert f'<b>{quality[0]:.1f}</b>PQ' in page and 'dark background' in page and page.count('<figure>') == 5
    assert len([*(tmp_path / 'report' / 'images').iterdir()]) == 5 and 'box AP' not in page

    run_tool(monkeypatch, 'predict', *args, work / 'data' / 'val', '--out', tmp_path / 'out', '--batch-size', 2)
    content = json.loads((tmp_path / 'out' / 'predictions.json').read_text())['annotations']
    assert measure(work, tmp_path / 'out' / 'panoptic', content).tolist() == pytest.approx(quality.tolist(), abs=2)
    listed = json.loads((tmp_path / 'out' / 'images.json').read_text())
    assert [c['isthing'] for c in listed['categories']] == [1, 1, 1, 1, 0, 0]
    for image, entry in zip(listed['images'], content, strict=True):
        ids = read_ids(tmp_path / 'out' / 'panoptic' / entry['file_name'])
        assert ids.shape == (image['height'], image['width']) == (64, 64)
        assert {s['id']: s['area'] for s in entry['segments_info']} == dict(
            zip(*(values.tolist() for values in np.unique(ids[ids > 0], return_counts=True)))
        )
        picture = cv2.imread(str(tmp_path / 'out' / image['file_name']))
        assert picture.shape == (64, 64, 3)

    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None:
        pytest.skip('no chromium or google-chrome to look at the page with')
    checked = tmp_path / 'checked.html'
    checked.write_text(page.replace('</body>', CHECK), 'utf-8')
    for size in ('1366,768', '500,844'):  # Chromium's narrowest window
        command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={size}', '--dump-dom']
        command += ['--virtual-time-budget=5000', f'--user-data-dir={tmp_path / "profile"}', checked.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        assert 'data-fits="true"' in shown and 'data-images="12 12"' in shown


def test_two_processes_equal_one(work, monkeypatch, tmp_path):
    """Five images, of which each process gets three, one of them a copy."""
    test = ['test', work / 'work' / f'{CONFIG}.py', work / 'work' / 'epoch_1.pth']
    settings = ['--cfg-options', 'test_dataloader.batch_size=1']
    run_tool(monkeypatch, *test, '--work-dir', tmp_path / 'one', *settings)
    in_processes(2, tmp_path, lambda: run_tool(monkeypatch, *test, '--work-dir', tmp_path / 'two', '--report',
                                               tmp_path / 'report', '--launcher', 'pytorch', *settings))  # fmt: skip
    ours, theirs = (read_metrics(tmp_path / name) for name in ('one', 'two'))
    names = [name for name in ours if name.startswith('coco_panoptic')]
    assert len(names) == 9 and [ours[name] for name in names] == [theirs[name] for name in names]
    written = json.loads((tmp_path / 'report' / 'predictions.panoptic.json').read_text())['annotations']
    quality = measure(work, tmp_path / 'report' / 'predictions.panoptic', written)
    assert quality[0] == pytest.approx(ours['coco_panoptic/PQ'])


def test_what_is_rejected(work, monkeypatch, tmp_path, capsys):
    run = work / 'work'
    args = run / f'{CONFIG}.py', run / 'epoch_1.pth'
    assert '--tta' in error_line(monkeypatch, 'test', *args, '--tta', '--work-dir', tmp_path / 'tta')
    assert 'PanopticFPN cannot be exported' in error_line(monkeypatch, 'export', *args, tmp_path / 'x.onnx')
    report = run / 'report'
    run_tool(monkeypatch, 'test', *args, '--work-dir', tmp_path / 'test', '--report', report)
    assert 'no detections' in error_line(monkeypatch, 'compare', f'a={run}', f'b={run}', '--out', tmp_path / 'out')
    shutil.rmtree(report)
    listing = ['--findings', tmp_path / 'findings.csv']
    run_tool(monkeypatch, 'prepare', work / 'data', *listing)  # boxes and masks, then panoptic labels
    printed = capsys.readouterr().out
    assert 'not used' not in printed and 'train CONFIG' in printed and 'train xcit_panopticfpn' in printed
    run_tool(monkeypatch, 'prepare', work / 'data', '--out', tmp_path / 'out', *listing)
    assert 'label PNGs of' in capsys.readouterr().out
    assert not list((tmp_path / 'out' / 'annotations').glob('panoptic*'))
    data, alone = tmp_path / 'data', tmp_path / 'alone'
    for folder in (data, alone):
        shutil.copytree(work / 'data', folder)
    for split in ('train', 'val'):
        (alone / 'annotations' / f'instances_{split}.json').unlink()
    run_tool(monkeypatch, 'prepare', alone, *listing)
    assert 'train xcit_panopticfpn' in capsys.readouterr().out
    for folder in (data, alone):
        (folder / 'annotations' / 'panoptic_val' / '000002.png').unlink()
        message = error_line(monkeypatch, 'prepare', folder, *listing)
        assert 'panoptic labels' in message and '000002.png' in message
