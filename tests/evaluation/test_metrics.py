"""The fast evaluator equals pycocotools in all metrics."""

import copy
import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import as_prediction
from mmdet.registry import METRICS
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import spec_mmdet.evaluation.metrics
from spec_mmdet import InputError
from spec_mmdet.data.reading import share_coco
from spec_mmdet.evaluation.metrics import Evaluation, make_fast_evaluation

ALONE = 1 / (1 + np.spacing(1))  # pycocotools' precision of a class with a single correct detection


def evaluated(evaluator, truth: dict, found: list[dict], kind: str, **params):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    coco.createIndex()
    other = dict(bbox='segmentation', segm='bbox')[kind]
    evaluation = evaluator(coco, coco.loadRes([{k: v for k, v in d.items() if k != other} for d in found]), kind)
    for name, value in params.items():
        setattr(evaluation.params, name, value)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def require_equal(truth: dict, found: list[dict], kind: str, **params) -> np.ndarray:
    """Compare all metrics of the two evaluators and return the 12 numbers."""
    theirs, ours = (evaluated(e, truth, found, kind, **params) for e in (COCOeval, make_fast_evaluation))
    assert np.array_equal(theirs.eval['recall'], ours.eval['recall'])
    assert np.array_equal(theirs.eval['scores'], ours.eval['scores'])
    precision = theirs.eval['precision']
    assert np.array_equal(np.where(precision == ALONE, 1, precision), ours.eval['precision'])
    assert np.abs(theirs.stats - ours.stats).max() < 2 * np.spacing(1)
    if not (precision == ALONE).any():
        assert np.array_equal(theirs.stats, ours.stats)
    return theirs.stats


def polygon(box: list[float]) -> list[list[float]]:
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x + w / 3, y + h]]


def rle(box: list[float]) -> dict:
    code = mask_utils.frPyObjects(polygon(box), 64, 64)[0]
    return dict(code, counts=code['counts'].decode())


def scene(rng: np.random.Generator, per_image: int) -> tuple[dict, list[dict]]:
    """Draw six images with crowds, objects of every area, empty images, classes without objects, and tied scores."""
    annotations, found = [], []

    def rectangle() -> list[float]:
        return [*rng.uniform(0, 50, 2), *rng.uniform(1, 40, 2) * rng.choice([0.2, 1, 3])]

    for image_id in range(1, 7):
        for _ in range(rng.integers(6)):
            box, crowd = rectangle(), int(rng.random() < 0.2)
            annotation = dict(image_id=image_id, category_id=int(rng.integers(1, 4)), iscrowd=crowd, bbox=box)
            annotation.update(id=len(annotations) + 1, area=box[2] * box[3] * rng.choice([1, 50, 300]))
            annotations.append(dict(annotation, segmentation=rle(box) if crowd else polygon(box)))
        for _ in range(rng.integers(per_image) if rng.random() < 0.8 else 0):
            box, category = rectangle(), int(rng.integers(1, 4))
            if annotations and rng.random() < 0.7:
                near = annotations[rng.integers(len(annotations))]
                category = near['category_id']
                box = (np.array(near['bbox']) + rng.normal(0, rng.choice([0, 1, 4]), 4)).clip(0.5).tolist()
            score = round(rng.random(), int(rng.choice([1, 9])))
            found.append(dict(image_id=image_id, category_id=category, score=score, bbox=box, segmentation=rle(box)))
    images = [dict(id=i, height=64, width=64, file_name='') for i in range(1, 7)]
    return dict(
        images=images, annotations=annotations, categories=[dict(id=c, name=str(c)) for c in range(1, 5)]
    ), found


@pytest.mark.parametrize('per_image', [12, 130])
def test_random_detections(per_image):
    rng = np.random.default_rng(per_image)
    for _ in range(8):
        truth, found = scene(rng, per_image)
        for kind in ('bbox', 'segm'):
            require_equal(truth, found, kind)
            require_equal(truth, found, kind, maxDets=[100, 300, 1000])  # as in MMDetection
    require_equal(truth, found, 'bbox', maxDets=[100, 300, 1000], useCats=0)  # as for proposals


def perturbed(coco: COCO) -> list[dict]:
    """Return the objects of two images in three as detections, moved a little, some twice, with coarse scores."""
    rng = np.random.default_rng(0)
    found = []
    for annotation in coco.dataset['annotations']:
        if annotation['image_id'] % 3:
            image, code = coco.imgs[annotation['image_id']], coco.annToRLE(annotation)
            mask = np.roll(mask_utils.decode(code), rng.integers(-3, 4, 2), axis=(0, 1))
            for _ in range(rng.integers(1, 3)):
                box = np.array(annotation['bbox']) * np.exp(rng.normal(0, 0.05, 4))
                code = mask_utils.encode(np.asfortranarray(mask))
                found.append(
                    dict(
                        image_id=image['id'],
                        category_id=annotation['category_id'],
                        score=round(rng.random(), 2),
                        bbox=box.tolist(),
                        segmentation=dict(code, counts=code['counts'].decode()),
                    )
                )
    return found


def test_coco(coco_mini):
    coco = COCO(str(coco_mini / 'annotations' / 'instances_val2017.json'))
    for kind in ('bbox', 'segm'):
        assert 0.1 < require_equal(coco.dataset, perturbed(coco), kind)[0] < 0.9


NAMES = ('1', '2', '3', '4')


def computed(kind: str, path: Path, found: list[dict], names: tuple = NAMES, **settings) -> dict:
    """Return the metrics of detections in the six images of a scene."""
    metric = METRICS.build(dict(type=kind, ann_file=path and str(path), **settings))
    metric.dataset_meta = dict(classes=names)
    images = sorted({d['image_id'] for d in found} | set(range(1, 7)))
    for image_id in images:
        own = [d for d in found if d['image_id'] == image_id]
        pred = as_prediction(own)
        instances = [
            dict(bbox=[0, 0, 9, 9], bbox_label=0, ignore_flag=0),
            dict(bbox=[9, 9, 30, 40], bbox_label=2, ignore_flag=1),
        ]
        sample = dict(img_id=image_id, ori_shape=(64, 64), pred_instances=pred, instances=instances)
        metric.process({}, [sample])
    return metric.compute_metrics(metric.results)


@pytest.mark.parametrize(
    'settings',
    [
        dict(metric=['bbox', 'segm'], classwise=True),
        dict(metric='bbox', proposal_nums=(3, 1, 100)),
        dict(metric='segm', metric_items=['mAP_s', 'AR@300', 'mAP']),
        dict(metric='proposal'),
        dict(metric='proposal', metric_items=['AR_s@1000', 'AR@100']),
        dict(metric='bbox', iou_thrs=np.array([0.3, 0.5, 0.75])),
        dict(metric='bbox', sort_categories=True),
        dict(metric='bbox', use_mp_eval=True),
    ],
    ids=str,
)
def test_metrics_equal_mmdetections(tmp_path, settings):
    truth, found = scene(np.random.default_rng(1), 30)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    expected = computed('CocoMetric', path, found, **settings)
    assert max(map(float, expected.values())) > 0.01
    for kind in ('CheckedCocoMetric', 'FastCocoMetric'):
        ours = computed(kind, path, found, **settings)
        assert list(ours) == list(expected)
        np.testing.assert_equal(ours, dict(expected))


@pytest.mark.parametrize('limit', [5, 300])
def test_ap_at_another_limit_of_detections(tmp_path, limit):
    truth, found = scene(np.random.default_rng(3), 900)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    boxes = [{k: v for k, v in d.items() if k != 'segmentation'} for d in found]
    coco = COCO(str(tmp_path / 'truth.json'))
    expected = COCOeval(coco, coco.loadRes(boxes), 'bbox')
    expected.params.maxDets = [limit]
    expected.evaluate()
    expected.accumulate()
    precision = expected.eval['precision'][:, :, :, 0, 0]
    ours = computed('FastCocoMetric', tmp_path / 'truth.json', found, proposal_nums=(1, 2, limit))['bbox_mAP']
    assert ours == round(precision[precision > -1].mean(), 3)
    assert limit > 100 or ours != computed('FastCocoMetric', tmp_path / 'truth.json', found)['bbox_mAP']


@pytest.mark.parametrize('kind', ['CheckedCocoMetric', 'FastCocoMetric'])
def test_metrics_of_a_data_set_without_an_annotation_file(tmp_path, kind):
    _, found = scene(np.random.default_rng(1), 30)
    near = [dict(d, bbox=[0, 0, 9, 8 + d['score']], category_id=1) for d in found]
    expected = computed('CocoMetric', None, near)
    assert 0.01 < expected['bbox_mAP'] < 1 and computed(kind, None, near) == dict(expected)


def test_what_is_written(tmp_path):
    truth, found = scene(np.random.default_rng(1), 30)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    settings = dict(format_only=True, metric=['bbox', 'segm'])
    written = {}
    for kind in ('CocoMetric', 'CheckedCocoMetric'):
        assert computed(kind, path, found, outfile_prefix=str(tmp_path / kind), **settings) == {}
        written[kind] = [json.loads((tmp_path / f'{kind}.{k}.json').read_text()) for k in ('bbox', 'segm')]
    assert written['CheckedCocoMetric'] == written['CocoMetric'] and len(written['CocoMetric'][0]) == len(found)


@pytest.mark.parametrize('kind', ['CheckedCocoMetric', 'FastCocoMetric'])
def test_without_detections_ap_is_zero(monkeypatch, tmp_path, kind):
    logged = []
    monkeypatch.setattr(spec_mmdet.evaluation.metrics, 'print_log', lambda *args: logged.append(args))
    truth, _ = scene(np.random.default_rng(1), 30)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    ours = computed(kind, tmp_path / 'truth.json', [], metric=['bbox', 'segm'])
    assert ours['bbox_mAP'] == ours['segm_mAP_50'] == 0
    warned = [text for text, _, *levels in logged if levels == [logging.WARNING]]
    assert len(warned) == 1 and 'nothing in 6 images' in warned[0]


def test_one_threshold_may_be_a_number(tmp_path):
    truth, found = scene(np.random.default_rng(1), 30)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    one = computed('CheckedCocoMetric', tmp_path / 'truth.json', found, iou_thrs=0.5)
    assert one['bbox_mAP'] == one['bbox_mAP_50'] > 0.01
    assert one['bbox_mAP_50'] == computed('CocoMetric', tmp_path / 'truth.json', found)['bbox_mAP_50']


@pytest.mark.parametrize('settings', [dict(metric_items=['mAP', 'AP']), dict(proposal_nums=(100,))], ids=str)
def test_wrong_arguments_are_rejected_before_the_run(settings):
    with pytest.raises(InputError, match='metric_items.* AP;|proposal_nums'):
        METRICS.build(dict(type='CheckedCocoMetric', **settings))


def test_masks_of_a_detector_without_masks(tmp_path):
    truth, _ = scene(np.random.default_rng(1), 30)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    metric = METRICS.build(dict(type='CheckedCocoMetric', ann_file=str(tmp_path / 'truth.json'), metric='segm'))
    metric.dataset_meta = dict(classes=NAMES)
    empty = dict(img_id=1, bboxes=np.zeros((0, 4)), scores=[], labels=[])
    with pytest.raises(InputError, match='segm'):
        metric.compute_metrics([({}, empty)])


def test_evaluations_leave_the_shared_annotations_alone(tmp_path):
    """Classes change "ignore" and masks, and a data set of the same file would then leave out crowds."""
    truth, found = scene(np.random.default_rng(1), 30)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(truth))
    before = copy.deepcopy(share_coco(path))
    for kind in ('CheckedCocoMetric', 'FastCocoMetric'):
        computed(kind, path, found, metric=['bbox', 'segm'])
    assert share_coco(path) == before


def test_without_faster_coco_eval(monkeypatch):
    monkeypatch.setattr(spec_mmdet.evaluation.metrics, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install faster-coco-eval'):
        METRICS.build(dict(type='FastCocoMetric'))


ABSURD = dict(
    segm=[
        dict(size=[64, 64], counts=[2**31, 2**31]),
        dict(size=[64, 64], counts=[1] * 9),
        dict(size=[2**20, 2**20], counts=[2**40]),
        dict(size=[64, 64], counts='0' * 1000),
        dict(size=[64, 64], counts='oo'),
        [[1e30, 1, 5e30, 1, 5, 5]],
        [[1, 1, 1e9, 1, 5, 5]],
        [[1, 1]],
        None,
    ],
    bbox=[[0, 0, float('nan'), 1], [0, 0, float('inf'), 1], [0, 0, 1], 'box'],
)


@pytest.mark.parametrize('kind', ABSURD)
@pytest.mark.parametrize('evaluator', [Evaluation, make_fast_evaluation])
def test_an_evaluation_of_absurd_objects_ends(kind, evaluator):
    truth, found = scene(np.random.default_rng(0), 4)
    for absurd in ABSURD[kind]:
        spoilt = copy.deepcopy(truth)
        spoilt['annotations'][3][dict(segm='segmentation', bbox='bbox')[kind]] = absurd
        with pytest.raises(InputError, match='annotation 4: .* cannot be evaluated'):
            evaluated(evaluator, spoilt, found, kind)
    # A mask that extends beyond its image is clipped; a box may have any size.
    truth['annotations'][3]['segmentation'] = polygon([-50.0, 1.0, 200.0, 20.0])
    truth['annotations'][3]['bbox'] = [0, 0, 1e30, 1e30]
    start = time.process_time()
    evaluated(evaluator, truth, found, kind)
    assert time.process_time() - start < 10
