"""AP of resampled images equals pycocotools' AP of a data set that repeats the images as often."""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.data.reading import AnnotationFile
from spec_mmdet.errors import InputError
from spec_mmdet.evaluation.bootstrap import ResampledAP, draw_weights

IMAGES, CLASSES = 6, 3


def rectangle(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def scenes(seed: int) -> tuple[list[dict], list[dict]]:
    """Draw objects, some of them crowds or with an invalid area, and results with distinct scores, near them or not."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for image in range(1, IMAGES + 1):
        for _ in range(rng.integers(0, 5)):
            x, y, w, h = *rng.integers(0, 60, 2), *rng.integers(8, 40, 2)
            category = int(rng.integers(1, CLASSES + 1))
            box = [float(v) for v in (x, y, w, h)]
            truth.append(dict(image_id=image, category_id=category, bbox=box, area=box[2] * box[3],
                              iscrowd=int(rng.random() < 0.1)))  # fmt: skip
            if rng.random() < 0.8:
                moved = [float(v) for v in np.array(box) + rng.normal(0, 2, 4)]
                found.append(dict(image_id=image, category_id=category, bbox=moved, score=float(rng.random())))
        far = [float(v) for v in (*rng.integers(0, 60, 2), 20, 20)]
        found.append(dict(image_id=image, category_id=int(rng.integers(1, CLASSES + 1)), bbox=far,
                          score=float(rng.random())))  # fmt: skip
    for entry in truth:
        entry['segmentation'] = [rectangle(entry['bbox'])]
        if rng.random() < 0.05:
            entry['area'] = -1.0
    # More than 100 detections of a class in an image; the last of them do not count.
    x, y, *size = truth[0]['bbox'] if truth else (5, 5, 20, 20)
    for _ in range(120 if seed % 2 else 0):
        found.append(dict(image_id=1, category_id=1, bbox=[x + rng.normal(0, 3), y, *size], score=float(rng.random())))
    return truth, found


def as_masks(found: list[dict]) -> list[dict]:
    masks = [mask_utils.frPyObjects([rectangle(entry['bbox'])], 100, 100)[0] for entry in found]
    return [dict({k: entry[k] for k in entry if k != 'bbox'}, segmentation=mask) for entry, mask in zip(found, masks)]


def coco(images: int, annotations: list[dict]) -> COCO:
    data = COCO()
    data.dataset = dict(
        info={},
        images=[dict(id=i, width=100, height=100) for i in range(1, images + 1)],
        annotations=[dict(entry, id=i) for i, entry in enumerate(annotations, start=1)],
        categories=[dict(id=i, name=str(i)) for i in range(1, CLASSES + 1)],
    )
    data.createIndex()
    return data


def repeated(entries: list[dict], weights: np.ndarray) -> list[dict]:
    """Repeat the entries of each image as often as its weight says, under new ids."""
    first = np.concatenate([[0], np.cumsum(weights)])
    return [
        dict(entry, image_id=int(first[entry['image_id'] - 1] + copy + 1))
        for entry in entries
        for copy in range(weights[entry['image_id'] - 1])
    ]


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(['bbox', 'segm']))
def test_resampled_ap_equals_pycocotools(seed, kind):
    truth, found = scenes(seed)
    found = as_masks(found) if kind == 'segm' else found
    if not any(not entry['iscrowd'] for entry in truth):
        return
    weights = draw_weights(IMAGES, 3, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        times_of = np.array([np.ones(IMAGES, int), *weights])
        measured = ResampledAP(coco(IMAGES, truth), found, kind)(times_of)
        for times, ours in zip(times_of, measured):
            data = coco(int(times.sum()), repeated(truth, times))
            again = repeated(found, times)
            if not again:
                continue
            evaluation = COCOeval(data, data.loadRes(again), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = evaluation.stats[0]
            assert np.isnan(ours) if expected == -1 else ours == pytest.approx(expected, abs=1e-12)


def test_ids_classes_and_blocks(tmp_path):
    """Ids may be text, classes may be left out, and the result does not depend on the size of blocks of draws."""
    truth, found = scenes(3)
    with contextlib.redirect_stdout(io.StringIO()):
        plain = coco(IMAGES, truth)
        weights = draw_weights(IMAGES, 7, 3)
        expected = ResampledAP(plain, found, 'bbox', [1, 3])(weights)
        texts = coco(IMAGES, [entry for entry in truth if entry['category_id'] != 2])
        for entries in (texts.dataset['images'], texts.dataset['categories']):
            entries[:] = [dict(entry, id=f'id {entry["id"]}', file_name='') for entry in entries]
        renamed = [dict(e, image_id=f'id {e["image_id"]}', category_id=f'id {e["category_id"]}') for e in found]
        for entry in texts.dataset['annotations']:
            entry.update(image_id=f'id {entry["image_id"]}', category_id=f'id {entry["category_id"]}')
    (tmp_path / 'truth.json').write_text(json.dumps(texts.dataset))
    annotations = AnnotationFile(str(tmp_path / 'truth.json'))
    annotations.number_detections(renamed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr('spec_mmdet.evaluation.bootstrap.BLOCK', 1)
        assert ResampledAP(annotations, renamed, 'bbox')(weights) == pytest.approx(expected, abs=1e-15, nan_ok=True)
    with pytest.raises(InputError, match='id 77'):
        annotations.number_detections([dict(renamed[0], image_id='id 77')])


def test_draws_cover_all_images_and_are_reproducible():
    weights = draw_weights(50, 200, seed=1)
    assert (weights.sum(axis=1) == 50).all() and (weights == draw_weights(50, 200, seed=1)).all()
    assert weights.std() == pytest.approx(1, abs=0.05)
