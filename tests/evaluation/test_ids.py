"""The metrics and the report do not depend on the ids of a data set: they equal those with ids from 1 on."""

import copy
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS
from test_metrics import evaluated, scene

from spec_mmdet import InputError
from spec_mmdet.data.reading import AnnotationFile
from spec_mmdet.evaluation.metrics import DumpPredictions, Evaluation, get_average_precision
from spec_mmdet.evaluation.outcomes import count_confusions, find_outcomes, match_detections

CLASSES = ('1', '2', '3', '4')


def hashed(index: int) -> int:
    return int.from_bytes(hashlib.blake2b(str(index).encode(), digest_size=8).digest(), 'big') | 1 << 63


def mixed(index: int) -> int | str:
    return f'number {index}' if index % 2 else -index


IDS = {  # Map images, annotations and categories to ids from 1 on.
    'plain': (lambda i: i, lambda i: i, lambda i: i),
    'image ids above 2^63': (hashed, lambda i: i, lambda i: i),
    'image ids of text': (lambda i: f'{9 - i}', lambda i: i, lambda i: i),
    'mixed image ids': (mixed, lambda i: i, lambda i: i),
    'annotation ids from 0': (lambda i: i, lambda i: i - 1, lambda i: i),
    'annotation ids of text': (lambda i: i, str, lambda i: i),
    'annotation ids above 2^53': (lambda i: i, lambda i: 2**53 + i, lambda i: i),
    'annotation ids above 2^64': (lambda i: i, lambda i: 2**64 + i, lambda i: i),
    'negative annotation ids': (lambda i: i, lambda i: -i, lambda i: i),
    'category ids from 0': (lambda i: i, lambda i: i, lambda i: i - 1),
    'category ids of text': (lambda i: i, lambda i: i, lambda i: f'c{i}'),
    'category ids that descend': (lambda i: i, lambda i: i, lambda i: 9 - i),
    'all of them': (hashed, lambda i: f'{i}', mixed),
}


def renumbered(entries: list[dict], image, annotation, category) -> list[dict]:
    entries = copy.deepcopy(entries)
    for entry in entries:
        for key, change in (('image_id', image), ('category_id', category), ('id', annotation)):
            if key in entry:
                entry[key] = change(entry[key])
    return entries


@pytest.mark.parametrize('name', IDS)
def test_metrics_do_not_depend_on_ids(tmp_path, name):
    image, annotation, category = IDS[name]
    truth, found = scene(np.random.default_rng(1), 30)
    expected = {kind: evaluated(Evaluation, truth, found, kind) for kind in ('bbox', 'segm')}
    assert 0.01 < expected['bbox'].stats[0] < 0.9
    other = dict(
        images=[{**entry, 'id': image(entry['id']), 'file_name': 'x.png'} for entry in truth['images']],
        categories=[{**entry, 'id': category(entry['id'])} for entry in truth['categories']],
        annotations=renumbered(truth['annotations'], image, annotation, category),
    )
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(other))

    figures = {}
    for kind in ('CheckedCocoMetric', 'FastCocoMetric'):
        out = str(tmp_path / kind)
        cfg = dict(type=kind, ann_file=str(path), metric=['bbox', 'segm'], classwise=True, outfile_prefix=out)
        metric = METRICS.build(cfg | dict(proposal_nums=(1, 10, 100)))
        metric.dataset_meta = dict(classes=CLASSES)
        results = []
        for entry in other['images']:
            own = [d for d in found if image(d['image_id']) == entry['id']]
            boxes = np.array([d['bbox'] for d in own]).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            result = dict(img_id=entry['id'], bboxes=boxes, scores=np.array([d['score'] for d in own]))
            result.update(labels=[d['category_id'] - 1 for d in own], masks=[dict(d['segmentation']) for d in own])
            results.append((dict(width=64, height=64, img_id=entry['id']), result))
        figures[kind] = metric.compute_metrics(results)
        for box_or_mask, evaluation in expected.items():
            for i, item in enumerate(('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')):
                assert figures[kind][f'{box_or_mask}_{item}'] == round(float(evaluation.stats[i]), 3)
        for i, label in enumerate(CLASSES):  # those of masks come last
            ap = get_average_precision(expected['segm'], i)
            assert round(figures[kind][f'{label}_precision'], 3) == pytest.approx(round(ap, 3) if ap > -1 else np.nan,
                                                                                  nan_ok=True)  # fmt: skip
        # Written results have the ids of the file.
        written = json.loads((tmp_path / f'{kind}.bbox.json').read_text())
        assert {d['image_id'] for d in written} <= {entry['id'] for entry in other['images']}
        assert {d['category_id'] for d in written} <= {entry['id'] for entry in other['categories']}

    annotations = AnnotationFile(str(path))
    assert [annotations.get_original('images', i) for i in annotations.imgs] == [e['id'] for e in other['images']]
    assert [annotations.get_original('annotations', i) for i in annotations.anns] == [
        e['id'] for e in other['annotations']
    ]
    summary = metric.summaries['bbox']
    assert np.abs(summary.stats - expected['bbox'].stats).max() < 1e-15
    evaluation = match_detections(annotations, tmp_path / 'FastCocoMetric.bbox.json', summary)
    outcome = find_outcomes(evaluation, 0.3)
    known = find_outcomes(expected['bbox'], 0.3)
    for part in ('true_positives', 'false_positives', 'false_negatives', 'crowd'):
        counts = [sum(len(getattr(o, part)) for o in each.values()) for each in (outcome, known)]
        assert counts[0] == counts[1]
    matrix = count_confusions(evaluation, outcome)
    assert np.array_equal(matrix, count_confusions(expected['bbox'], known)) and np.trace(matrix) > 0


def test_data_set_and_metric_agree(tmp_path):
    """Detections have the ids of the data set: the file's ids in MMDetection's class, numbers in ours."""
    truth, _ = scene(np.random.default_rng(1), 30)
    ids = dict(zip(range(1, 7), (2, 1, 'one', 'two', 2**70, -3)))  # 1 and 2 are also ids of the file
    truth['images'] = [{**entry, 'id': ids[entry['id']], 'file_name': 'x.png'} for entry in truth['images']]
    for entry in truth['annotations']:
        entry['image_id'] = ids[entry['image_id']]
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    for kind in ('CocoDataset', 'CheckedCocoDataset'):
        cfg = dict(type=kind, ann_file=str(path), data_prefix=dict(img=''), pipeline=[], test_mode=True)
        dataset = DATASETS.build(cfg | dict(metainfo=dict(classes=CLASSES)))
        prefix = tmp_path / kind
        metric = METRICS.build(dict(type='CheckedCocoMetric', ann_file=str(path), outfile_prefix=str(prefix)))
        metric.dataset_meta = dataset.metainfo
        for entry in map(dataset.get_data_info, range(len(dataset))):
            boxes = torch.tensor([i['bbox'] for i in entry['instances']]).reshape(-1, 4)
            labels = torch.tensor([i['bbox_label'] for i in entry['instances']], dtype=torch.long)
            pred = dict(bboxes=boxes, labels=labels, scores=torch.ones(len(labels)))
            sample = dict(img_id=entry['img_id'], ori_shape=(64, 64), pred_instances=pred)
            metric.process({}, [sample])
        assert metric.compute_metrics(metric.results)['bbox_mAP_50'] > 0.9
        written = {d['image_id'] for d in json.loads(Path(f'{prefix}.bbox.json').read_text())}
        assert written == {entry['image_id'] for entry in truth['annotations'] if entry['bbox'][0] < 64}

    dump = DumpPredictions(str(tmp_path / 'out.pkl'), [metric])
    for entry in map(dataset.get_data_info, range(len(dataset))):
        dump.process({}, [dict(img_id=entry['img_id'])])
    dump.compute_metrics(dump.results)
    assert [d['img_id'] for d in pickle.loads((tmp_path / 'out.pkl').read_bytes())] == list(ids.values())


def test_detections_of_another_data_set(tmp_path):
    truth, found = scene(np.random.default_rng(1), 30)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    with pytest.raises(InputError, match='image 99'):
        AnnotationFile(str(tmp_path / 'truth.json')).loadRes([{**found[0], 'image_id': 99}])
