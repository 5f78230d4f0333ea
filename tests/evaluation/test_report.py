"""The report's metrics are those of pycocotools, and a browser shows all of it."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import CHECK, ROOT, as_prediction, error_line, run_tool
from mmdet.registry import METRICS
from mmengine.config import Config
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.data import reading, shapes
from spec_mmdet.data.fitting import set_classes
from spec_mmdet.evaluation import report
from spec_mmdet.evaluation.outcomes import ERRORS, count_confusions, find_outcomes, measure_scores
from spec_mmdet.files import write_folder_atomically

CONFIG = ROOT / 'configs' / 'xcit_spec_shapes.py'
NAMES = ('circle', 'square', 'triangle', 'star')


def detections(coco: COCO, rng: np.random.Generator) -> list[dict]:
    """Objects moved, with a wrong class, detected twice or not at all, and boxes on background."""
    found = []
    for annotation in coco.dataset['annotations']:
        code = mask_utils.encode(np.asfortranarray(coco.annToMask(annotation)))
        code = dict(code, counts=code['counts'].decode())
        for _ in range(rng.integers(3)):
            box = np.array(annotation['bbox']) + rng.normal(0, 2, 4)
            category = annotation['category_id'] if rng.random() < 0.7 else int(rng.integers(1, 4))
            score = 0.4 * rng.random() + 0.5 * (category == annotation['category_id'])
            entry = dict(image_id=annotation['image_id'], category_id=category, score=round(score, 3))
            found.append(dict(entry, bbox=box.clip(1).tolist(), segmentation=code))
    return found


@pytest.fixture
def data(tmp_path) -> Path:
    """Images with a crowd, one without any object, and a class without any."""
    shapes.write_split(tmp_path, 'val', 30, 96, np.random.default_rng(3))
    path = tmp_path / 'annotations' / 'instances_val.json'
    coco = json.loads(path.read_text())
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] != 2 and a['category_id'] != 4]
    assert any(a['iscrowd'] for a in coco['annotations'])
    path.write_text(json.dumps(coco))
    return tmp_path


def settings(root: Path) -> dict:
    return {
        'test_dataloader.dataset.data_root': f'{root}/',
        'test_evaluator.ann_file': str(root / 'annotations' / 'instances_val.json'),
    }


def write_report(root: Path, found: list[dict], **evaluator) -> str:
    """Return the page for these detections."""
    folder = root / 'report'
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(settings(root))
    cfg.test_evaluator.update(evaluator)
    set_classes(cfg, NAMES)
    report.prepare(folder, cfg)
    command = ['spec-mmdet', 'test', '--report', 'a & b', f'{Path.cwd()}/c']
    with write_folder_atomically(folder) as aside:
        metric = METRICS.build(cfg.test_evaluator)
        metric.dataset_meta = dict(classes=NAMES)
        for image in metric.annotations.imgs:
            own = [d for d in found if d['image_id'] == image]
            pred = as_prediction(own)
            metric.process({}, [dict(img_id=image, ori_shape=(96, 96), pred_instances=pred)])
        metric.compute_metrics(metric.results)
        tested = report.TestResults(
            'None', [('queries', '12', '345', '–', '–')], '7 images per second', dict(seed=5, commit='abc'),
            dict(position='after epoch 3', sha256='12ab', seed=5), {'loss': ([1, 2], [3.0, 2.0])}, metric,
        )  # fmt: skip
        report.write(aside, cfg, 'epoch_<3>.pth', command, tested)
    return (folder / 'index.html').read_text('utf-8')


def table(page: str, name: str) -> list[list[str]]:
    (content,) = re.findall(f'<table id="{name}">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    return [re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row) for row in re.findall('<tr>(.*?)</tr>', content, re.DOTALL)]


def pycocotools(coco: COCO, found: list[dict], kind: str, **params) -> COCOeval:
    other = dict(bbox='segmentation', segm='bbox')[kind]
    evaluation = COCOeval(coco, coco.loadRes([{k: v for k, v in d.items() if k != other} for d in found]), kind)
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    evaluation.accumulate()
    if not params:
        evaluation.summarize()
    return evaluation


def printed(value: float) -> str:
    return '–' if value == -1 else f'{value:.3f}'


def mean(precision: np.ndarray) -> float:
    return precision[precision > -1].mean() if (precision > -1).any() else -1


def test_metrics_equal_those_of_pycocotools(data):
    path = str(data / 'annotations' / 'instances_val.json')
    found = detections(COCO(path), np.random.default_rng(0))
    page = write_report(data, found)

    boxes, masks = (pycocotools(COCO(path), found, kind) for kind in ('bbox', 'segm'))
    assert 0.1 < boxes.stats[0] < 0.9
    columns = zip(map(printed, boxes.stats), map(printed, masks.stats))
    assert [row[1:3] for row in table(page, 'stats')] == [list(pair) for pair in columns]
    objects = [a for a in COCO(path).dataset['annotations'] if not a['iscrowd']]
    sizes = [sum(low <= a['area'] <= high for a in objects) for low, high in boxes.params.areaRng]
    assert [row[3] for row in table(page, 'stats')] == [str(sizes[i]) for i in (0, 0, 0, 1, 2, 3) * 2]
    assert sizes[0] == len(objects) and min(sizes[:3]) > 0

    # Repeat with the detections above the score threshold, which define true and false positives.
    def counts(least, kind='bbox'):
        sure = [d for d in found if d['score'] >= least]
        alone = pycocotools(COCO(path), sure, kind, iouThrs=np.array([0.5]), areaRng=[[0, 1e10]], areaRngLbl=['all'])
        entries = [e for e in alone.evalImgs if e]
        hits = sum(int(((e['dtMatches'] > 0) & ~e['dtIgnore']).sum()) for e in entries)
        return hits, sum(int(((e['dtMatches'] == 0) & ~e['dtIgnore']).sum()) for e in entries)

    scores = measure_scores(boxes)
    assert np.isnan(scores.precision[100]) and scores.recall[100] == 0  # no detection remains
    for place in (0, 20, 50, 80):
        hits, false = counts(scores.thresholds[place])
        assert scores.precision[place] == pytest.approx(hits / (hits + false))
        assert scores.recall[place] == pytest.approx(hits / len(objects))
        assert scores.f1[place] == pytest.approx(2 * hits / (hits + false + len(objects)))
    least = scores.thresholds[scores.best]
    hits, false = counts(least)
    assert scores.f1[scores.best] == scores.f1.max() and 0 < least < 1
    of_masks = measure_scores(masks)
    expected = []
    for name, kind, found_scores in (('Boxes', 'bbox', scores), ('Masks', 'segm', of_masks)):
        best = found_scores.thresholds[found_scores.best]
        right, wrong = counts(best, kind)
        f1 = 2 * right / (right + wrong + len(objects))
        numbers = [f'{best:.2f}', f'{f1:.2f}', f'{right / (right + wrong):.0%}', f'{right / len(objects):.0%}']
        expected.append([name, *numbers, *map(str, (len(objects), right, len(objects) - right, wrong))])
    assert table(page, 'counts') == expected
    assert hits and false and f'<b>{hits} of {len(objects)}</b>' in page
    assert f'score threshold <b>{least:.2f}</b>' in page.replace('\n', ' ')
    outcome_of = find_outcomes(boxes, least)
    assert sum(len(o.false_negatives) for o in outcome_of.values()) == len(objects) - hits
    matrix = count_confusions(boxes, outcome_of)
    assert np.trace(matrix) == hits and matrix[:, :-1].sum() == hits + false

    expected = []
    for i, name in enumerate(NAMES):
        by_box, by_mask = (e.eval['precision'][:, :, i, 0, -1] for e in (boxes, masks))
        figures = [printed(mean(figure)) for figure in (by_box, by_mask, by_box[0])]
        counted = [sum(a['category_id'] == i + 1 for a in objects), matrix[i, i], matrix[:, i].sum() - matrix[i, i]]
        expected.append([name, *figures, *map(str, counted)])
    assert table(page, 'classes') == expected
    assert expected[3][:5] == ['star', '–', '–', '–', '0']
    errors = {kind: sum(len(o.errors[kind]) for o in outcome_of.values()) for kind in ERRORS}
    assert [row[:2] for row in table(page, 'errors')] == [[kind, str(number)] for kind, number in errors.items()]
    lower = find_outcomes(boxes, 0.1)
    confused = count_confusions(boxes, lower)[:-1, :-1]
    assert confused.sum() - np.trace(confused) == sum(len(o.errors['class']) for o in lower.values()) > 0
    assert {row[0] for row in table(page, 'counts')} == {'Boxes', 'Masks'} and 'confusion_masks.csv' in page
    anchors = re.findall('<a href="#([^"]+)">', page)
    assert len(anchors) > 8 and all(f'<section id="{anchor}">' in page for anchor in anchors)
    assert not re.search(r'<th(?![^>]*scope=)', page.replace('<thead', '')) and not re.search(
        '<img(?![^>]*alt="[^"]{5})', page
    )
    assert '<h3>no error</h3>' in page
    assert sum(errors.values()) - errors['missed'] == false

    assert 'epoch_&lt;3&gt;.pth' in page and '&#39;a &amp; b&#39; c</code>' in page and '<dd>5</dd>' in page
    assert table(page, 'conditioning') == [['queries', '12', '345', '–', '–']]
    links = re.findall('<a href="(images/[^"]+)">', page)
    assert links and all((data / 'report' / unquote(link)).is_file() for link in links)


def test_masks_without_boxes(data):
    """Report only masks, as for SOLO, whose boxes are all 0."""
    path = str(data / 'annotations' / 'instances_val.json')
    found = detections(COCO(path), np.random.default_rng(0))
    masks = pycocotools(COCO(path), found, 'segm')
    page = write_report(data, [dict(d, bbox=[0, 0, 0, 0]) for d in found], metric='segm')
    assert [row[1] for row in table(page, 'stats')] == [printed(value) for value in masks.stats]
    assert [row[0] for row in table(page, 'counts')] == ['Masks'] and len(table(page, 'classes')[0]) == 6
    assert 'mask IoU ≥ 0.5' in page and not (data / 'report' / 'detections.bbox.json').exists()


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_kinds_of_errors_equal_tides(data, kind):
    """Compare with the package of TIDE's authors, on data without crowds, which it counts differently."""
    tidecv = pytest.importorskip('tidecv')
    path = data / 'annotations' / 'instances_val.json'
    coco = json.loads(path.read_text())
    coco['annotations'] = [a for a in coco['annotations'] if not a['iscrowd']]
    path.write_text(json.dumps(coco))
    found = detections(COCO(str(path)), np.random.default_rng(1))
    rng = np.random.default_rng(2)
    for entry in found:
        shift = rng.choice([0, 4, 12, 40])
        entry.update(bbox=(np.array(entry['bbox']) + [shift, 0, 0, 0]).tolist(), score=round(float(rng.random()), 6))
    evaluation = pycocotools(COCO(str(path)), found, kind)
    mine = [outcome.errors for outcome in find_outcomes(evaluation, 0.3).values()]
    truth, results = tidecv.Data('truth'), tidecv.Data('found')
    for image in coco['images']:
        truth.add_image(image['id'], image['file_name'])
    for a in coco['annotations']:
        mask = evaluation.cocoGt.annToRLE(a)
        truth.add_ground_truth(a['image_id'], a['category_id'], a['bbox'], mask)
    for d in found:
        if d['score'] >= 0.3:
            results.add_detection(d['image_id'], d['category_id'], d['score'], d['bbox'], d['segmentation'])
    mode = tidecv.TIDE.BOX if kind == 'bbox' else tidecv.TIDE.MASK
    theirs = tidecv.TIDE(pos_threshold=0.5, background_threshold=0.1).evaluate(truth, results, mode=mode)
    counted = {kind.short_name: len(errors) for kind, errors in theirs.error_dict.items()}
    assert {short: sum(len(errors[kind]) for errors in mine) for kind, (short, _) in ERRORS.items()} == counted
    assert sum(map(bool, counted.values())) >= (6 if kind == 'bbox' else 3)  # masks are where the objects are


def test_confusions_of_a_small_example(tmp_path):
    """A circle detected as a square, a square detected twice, a missed circle, a triangle on background."""
    box = dict(a=[0, 0, 10, 10], b=[20, 0, 10, 10], c=[40, 0, 10, 10], nothing=[60, 60, 10, 10])
    objects = ((1, 1, 'a'), (2, 2, 'b'), (3, 1, 'c'))
    truth = [dict(id=i, image_id=1, category_id=c, bbox=box[b], area=100, iscrowd=0) for i, c, b in objects]
    coco = COCO()
    coco.dataset = dict(images=[dict(id=1)], annotations=truth, categories=[dict(id=c, name=str(c)) for c in (1, 2, 3)])
    coco.createIndex()
    found = ((2, 'a', 0.9), (2, 'b', 0.9), (2, 'b', 0.8), (3, 'nothing', 0.7), (1, 'c', 0.2))
    found = [dict(image_id=1, category_id=c, bbox=box[b], score=score) for c, b, score in found]
    evaluation = pycocotools(coco, found, 'bbox')
    outcome_of = find_outcomes(evaluation, 0.3)
    matrix = count_confusions(evaluation, outcome_of)
    assert matrix.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]
    kinds = {kind: ids for kind, ids in outcome_of[1].errors.items() if ids}
    assert outcome_of[1].confused == [(1, 1)]
    assert kinds == {'class': [1], 'duplicate': [3], 'background': [4], 'missed': [3]}


def test_in_a_browser(data, tmp_path):
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if browser is None:
        pytest.skip('no chromium or google-chrome to look at the page with')
    path = str(data / 'annotations' / 'instances_val.json')
    found = detections(COCO(path), np.random.default_rng(0))
    checked = tmp_path / 'checked.html'
    checked.write_text(write_report(data, found).replace('</body>', CHECK), 'utf-8')
    for size in ('1366,768', '500,844'):  # Chromium's narrowest window
        command = [browser, '--headless', '--no-sandbox', '--disable-gpu', f'--window-size={size}', '--dump-dom']
        command += ['--virtual-time-budget=5000', f'--user-data-dir={tmp_path / "profile"}', checked.as_uri()]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        number, whole = re.search(r'data-images="(\d+) (\d+)"', shown).groups()
        assert number == whole and int(number) > 6
        assert 'data-fits="true"' in shown
    boxes, masks = (pycocotools(COCO(path), found, kind) for kind in ('bbox', 'segm'))
    assert table(shown, 'stats')[0][:3] == ['AP', printed(boxes.stats[0]), printed(masks.stats[0])]


def test_the_command(monkeypatch, data, tmp_path):
    """Write the report of an untrained detector without detections."""
    from mmdet.registry import MODELS

    cfg = Config.fromfile(CONFIG)
    set_classes(cfg, NAMES)
    checkpoint = tmp_path / 'untrained.pth'
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
    options = dict(settings(data), **{'model.test_cfg.rcnn.score_thr': 1.1})
    options = [f'{key}={value}' for key, value in options.items()]
    args = [CONFIG, checkpoint, '--work-dir', tmp_path / 'work', '--cfg-options', *options]
    folder = tmp_path / 'a' / 'report'
    parsed, read = [], reading.read_json
    monkeypatch.setattr(reading, 'read_json', lambda path: parsed.append(path.name) or read(path))
    for _ in range(2):  # the second replaces the first
        run_tool(monkeypatch, 'test', *args, '--report', folder)
        assert parsed == ['instances_val.json']  # by the first alone, and for all of it
        page = (folder / 'index.html').read_text('utf-8')
        assert [row[1] for row in table(page, 'stats')[:3]] == ['0.000'] * 3 and '<b>0 of ' in page
        assert 'The detector predicted nothing' in page and 'no threshold can be recommended' in page
        assert [row[1] for row in table(page, 'errors')[:5]] == ['0'] * 5
        assert [row[0] for row in table(page, 'conditioning')] == ['queries', 'keys', 'values'] and 'lam=1)' in page
        assert (folder / 'confusion.csv').read_text().startswith('truth,predicted,count') and 'confusion.csv' in page
        record = json.loads((folder / 'data.json').read_text())
        content = Path(record['annotations']).read_bytes()
        assert record['sha256'] == hashlib.sha256(content).hexdigest() and record['classes'] == list(NAMES)
        assert len(record['weights']['sha256']) == 64 and record['weights']['sha256'] in page
        assert 'images per second' in page and 'not recorded in the checkpoint' in page
        assert (
            f'test {os.path.relpath(CONFIG, Path.cwd())} {checkpoint} --work-dir' in page
            and f'--report {folder}' in page
        )

    (data / 'val' / 'index.html').write_text("somebody's")
    for other in (data / 'val', checkpoint):
        assert 'other than a report' in error_line(monkeypatch, 'test', *args, '--report', other)
    for option in ('test_evaluator.format_only=True', 'test_evaluator.metric=proposal'):
        assert "the metric 'bbox'" in error_line(monkeypatch, 'test', *args, option, '--report', tmp_path / 'new')
    assert 'needs a FastCocoMetric' in error_line(
        monkeypatch, 'test', *args, 'test_evaluator.type=VOCMetric', '--report', tmp_path / 'new'
    )
    assert not (tmp_path / 'new').exists()
