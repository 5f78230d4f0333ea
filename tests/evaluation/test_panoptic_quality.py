"""Panoptic quality equals the published definition, evaluated segment by segment, and that of panopticapi-lite."""

import json
from contextlib import redirect_stdout
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mmdet.registry import METRICS

from spec_mmdet.data.panoptic import read_ids
from spec_mmdet.data.rules import decode_ids, encode_ids
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.panoptic import Segments, average, count_matches, match_segments, measure_quality

CLASSES = 3
CATEGORIES = ((7, 'sky', 0), (3, 'cat', 1), (5, 'dog', 1))


@st.composite
def images(draw) -> tuple[Segments, Segments]:
    """Draw the truth and the prediction of an image: similar maps of few segments, with void and crowds."""
    shape = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    labels = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=5)
    truth_labels, found_labels = draw(labels), draw(labels)
    truth = draw(arrays(int, shape, elements=st.integers(-1, len(truth_labels) - 1)))
    other = draw(arrays(int, shape, elements=st.integers(-1, len(found_labels) - 1)))
    kept = draw(arrays(bool, shape))
    found = np.where(kept & (truth < len(found_labels)), truth, other)
    crowd = np.array(draw(st.lists(st.booleans(), min_size=len(truth_labels), max_size=len(truth_labels))))
    present = np.unique(found[found >= 0])  # a predicted segment has pixels
    found = np.searchsorted(present, found) * (found >= 0) - (found < 0)
    found_labels = np.array(found_labels)[present]
    return (
        Segments(truth, np.array(truth_labels), crowd),
        Segments(found, found_labels.astype(int), np.zeros(len(present), bool)),
    )


def define(truth: Segments, found: Segments) -> dict[int, list]:
    """Return IoUs, false positives and false negatives by class, as Kirillov et al. define them on sets of pixels."""
    pixels = [(y, x) for y, x in np.ndindex(truth.places.shape)]
    void = {p for p in pixels if truth.places[p] < 0}
    objects = [{p for p in pixels if truth.places[p] == i} for i in range(len(truth.labels))]
    segments = [{p for p in pixels if found.places[p] == j} for j in range(len(found.labels))]
    result = {label: [[], 0, 0] for label in range(CLASSES)}
    hit, taken = set(), set()
    for i, own in enumerate(objects):
        for j, segment in enumerate(segments):
            # "all pixels in the prediction that are labeled as void in the ground truth are removed"
            union = own | segment - void
            iou = Fraction(len(own & segment), len(union)) if union else 0
            if iou > Fraction(1, 2) and truth.labels[i] == found.labels[j] and not truth.crowd[i]:
                assert i not in hit and j not in taken  # the theorem: a matching is unique
                hit.add(i)
                taken.add(j)
                result[truth.labels[i]][0].append(iou)
    for i in range(len(objects)):
        result[truth.labels[i]][2] += i not in hit and not truth.crowd[i]
    for j, segment in enumerate(segments):
        # "unmatched predicted segments that contain a fraction of void pixels over the matching threshold are removed";
        # the same for group regions of the same class
        groups = [objects[i] for i in np.flatnonzero(truth.crowd & (truth.labels == found.labels[j]))]
        lost = segment & void.union(*groups)
        result[found.labels[j]][1] += j not in taken and not Fraction(len(lost), len(segment)) > Fraction(1, 2)
    return result


@settings(max_examples=300, deadline=None)
@given(st.lists(images(), min_size=1, max_size=3))
def test_counts_equal_the_definition(pairs):
    counts = sum(count_matches(*pair, CLASSES) for pair in pairs)
    defined = [define(*pair) for pair in pairs]
    qualities = []
    for label in range(CLASSES):
        ious = [iou for own in defined for iou in own[label][0]]
        wrong, missed = (sum(own[label][k] for own in defined) for k in (1, 2))
        assert counts[label, 1:].tolist() == [len(ious), wrong, missed]
        assert counts[label, 0] == pytest.approx(float(sum(ious)))
        size = len(ious) + Fraction(wrong + missed, 2)
        quality = measure_quality(counts)[label]
        assert np.isnan(quality).all() == (size == 0)
        if size:
            qualities.append(float(sum(ious) / size))
            assert quality[0] == pytest.approx(qualities[-1])
            assert quality[0] == pytest.approx(quality[1] * quality[2])
    if qualities:
        assert average(measure_quality(counts))[0] == pytest.approx(np.mean(qualities))


@settings(max_examples=200, deadline=None)
@given(images())
def test_counts_equal_panopticapi(tmp_path_factory, pair):
    """Compare with panopticapi-lite, which has no licence and needs NumPy 1, so that no extra installs it."""
    evaluation = pytest.importorskip('panopticapi.evaluation')
    truth, found = pair
    crowds = [label for label, crowd in zip(truth.labels, truth.crowd) if crowd]
    assume(len(crowds) == len(set(crowds)))  # panopticapi counts only the last crowd of a class
    folder, annotations = tmp_path_factory.getbasetemp(), []
    for name, side in (('truth', truth), ('found', found)):
        (folder / f'{name}.png').write_bytes(cv2.imencode('.png', encode_ids(side.places + 1)[..., ::-1])[1])
        segments = [
            dict(id=i + 1, category_id=int(label), iscrowd=int(crowd), area=int((side.places == i).sum()))
            for i, (label, crowd) in enumerate(zip(side.labels, side.crowd))
        ]
        annotations.append(dict(image_id=1, file_name=f'{name}.png', segments_info=segments))
    categories = {label: {} for label in range(CLASSES)}
    with redirect_stdout(None):
        theirs = evaluation.pq_compute_single_core(0, [annotations], folder, folder, categories)
    ours = count_matches(truth, found, CLASSES)
    for label, (iou, *counts) in enumerate(ours.tolist()):
        assert counts == [theirs[label].tp, theirs[label].fp, theirs[label].fn]
        assert iou == pytest.approx(theirs[label].iou)


def test_a_case_by_hand():
    truth = np.zeros((10, 10), int)
    truth[:, 5:], truth[0] = 1, -1  # 45 pixels each, and 10 of void
    found = np.zeros((10, 10), int)
    found[:, 5:] = 1
    found[1:7, 5:] = 2  # 30 of the 45 pixels, so that the rest of segment 1 is a false positive
    found[0, :3] = 3  # void alone: ignored
    match = match_segments(
        Segments(truth, np.array([0, 1]), np.zeros(2, bool)), Segments(found, np.array([0, 1, 1, 2]), np.zeros(4, bool))
    )
    assert match.pairs.tolist() == [[0, 0], [1, 2]] and match.ious.tolist() == [1, 30 / 45]
    assert match.false_positives.tolist() == [1] and match.ignored.tolist() == [3] and not len(match.false_negatives)


@given(arrays(np.int32, (2, 3), elements=st.integers(0, 256**3 - 1)))
def test_ids_survive_a_png(tmp_path_factory, ids):
    path = tmp_path_factory.getbasetemp() / 'ids.png'
    path.write_bytes(cv2.imencode('.png', encode_ids(ids)[..., ::-1])[1])
    assert (read_ids(path) == ids).all() and (decode_ids(encode_ids(ids)) == ids).all()
    assert decode_ids(np.array([[[1, 2, 3]]])).tolist() == [[1 + 2 * 256 + 3 * 256**2]]


@pytest.fixture
def written(tmp_path) -> tuple[list[dict], dict]:
    """Random truth and predictions of images as files in COCO's format, with text as ids of images."""
    rng = np.random.default_rng(0)
    (tmp_path / 'truth').mkdir()
    categories = [
        dict(id=7, name='sky', isthing=0),
        dict(id=3, name='cat', isthing=1),
        dict(id=5, name='dog', isthing=1),
    ]
    coco, samples = dict(images=[], annotations=[], categories=categories), []
    for image in range(8):
        blocks = rng.integers(0, 6, (4, 5)).repeat(8, 0).repeat(8, 1)
        ids = np.where(blocks > 0, blocks * 70_000, 0)
        segments = [
            dict(id=int(i), category_id=int(rng.choice([3, 5, 7])), area=int((ids == i).sum()), bbox=[0, 0, 9, 9],
                 iscrowd=int(rng.random() < 0.2))
            for i in np.unique(ids) if i
        ]  # fmt: skip
        (tmp_path / 'truth' / f'{image}.png').write_bytes(cv2.imencode('.png', encode_ids(ids)[..., ::-1])[1])
        coco['images'].append(dict(id=f'image {image}', file_name=f'{image}.jpg', height=32, width=40))
        coco['annotations'].append(dict(image_id=f'image {image}', file_name=f'{image}.png', segments_info=segments))
        # Labels are 0 cat, 1 dog, 2 sky (things first) and 3 void.
        label = {s['id']: [3, 5, 7].index(s['category_id']) for s in segments}
        found = np.full(ids.shape, 3)
        for instance, (index, own) in enumerate(label.items(), start=1):
            own = own if rng.random() < 0.8 else int(rng.integers(3))
            found[ids == index] = own + 1000 * instance * (own < 2)
        found = np.where(rng.random(ids.shape) < 0.25, np.roll(found, 8, axis=1), found)
        panoptic = torch.from_numpy(found)[None]
        samples.append(dict(img_id=f'image {image}', pred_panoptic_seg=dict(sem_seg=panoptic)))
    (tmp_path / 'truth.json').write_text(json.dumps(coco))
    return samples, dict(ann_file=str(tmp_path / 'truth.json'), seg_prefix=str(tmp_path / 'truth'))


def test_the_metric_and_its_files(written, tmp_path):
    samples, arguments = written
    metric = METRICS.build(dict(type='PanopticQuality', **arguments, outfile_prefix=str(tmp_path / 'found')))
    metric.dataset_meta = dict(classes=('cat', 'dog', 'sky'))
    for sample in samples:
        metric.process({}, [sample])
    metrics = metric.evaluate(len(samples))
    assert {'coco_panoptic/PQ', 'coco_panoptic/SQ_th', 'coco_panoptic/RQ_st'} <= {*metrics} and len(metrics) == 9
    assert 5 < metrics['coco_panoptic/PQ'] < 95
    # The files that were written have the same quality.
    entries = {e['image_id']: e for e in json.loads((tmp_path / 'found.panoptic.json').read_text())['annotations']}
    truth = json.loads((tmp_path / 'truth.json').read_text())
    order, counts = {3: 0, 5: 1, 7: 2}, 0
    for annotation in truth['annotations']:
        entry, sides = entries[annotation['image_id']], []
        for folder, e in ((tmp_path / 'truth', annotation), (tmp_path / 'found.panoptic', entry)):
            sides.append(Segments.from_ids(read_ids(folder / e['file_name']), e['segments_info'], order))
        assert all(s['area'] == (read_ids(tmp_path / 'found.panoptic' / entry['file_name']) == s['id']).sum()
                   for s in entry['segments_info'])  # fmt: skip
        counts = counts + count_matches(*sides, CLASSES)
    assert 100 * average(measure_quality(counts))[0] == pytest.approx(metrics['coco_panoptic/PQ'])
    things = 100 * average(measure_quality(counts)[:2])
    assert things.tolist() == pytest.approx([metrics[f'coco_panoptic/{kind}_th'] for kind in ('PQ', 'SQ', 'RQ')])


def test_wrong_settings_are_rejected(written):
    with pytest.raises(InputError, match='seg_prefix'):
        METRICS.build(dict(type='PanopticQuality', ann_file=written[1]['ann_file']))
    with pytest.raises(InputError, match='missing'):
        read_ids('nowhere.png')
