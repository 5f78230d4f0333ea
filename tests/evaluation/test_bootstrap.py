"""AP of resampled images is what pycocotools says of a data set in which images are there as often."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from spec_mmdet.evaluation.bootstrap import ResampledAP, draw_weights

IMAGES, CLASSES = 6, 3


def scenes(seed: int) -> tuple[list[dict], list[dict]]:
    """Objects, some of them crowds, and results near them and elsewhere, with distinct scores."""
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
    return truth, found


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
    """Entries of images of which each is there as often as its weight says, under new ids."""
    first = np.concatenate([[0], np.cumsum(weights)])
    return [
        dict(entry, image_id=int(first[entry['image_id'] - 1] + copy + 1))
        for entry in entries
        for copy in range(weights[entry['image_id'] - 1])
    ]


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_resampled_ap_is_that_of_pycocotools(seed):
    truth, found = scenes(seed)
    if not any(not entry['iscrowd'] for entry in truth):
        return
    weights = draw_weights(IMAGES, 3, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        resampled = ResampledAP(coco(IMAGES, truth), found, 'bbox')
        for times in (np.ones(IMAGES, int), *weights):
            data = coco(int(times.sum()), repeated(truth, times))
            again = repeated(found, times)
            if not again:
                continue
            evaluation = COCOeval(data, data.loadRes(again), 'bbox')
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            expected = evaluation.stats[0]
            ours = resampled(times)
            assert np.isnan(ours) if expected == -1 else ours == pytest.approx(expected, abs=1e-12)


def test_draws_are_of_all_images_and_the_same_again():
    weights = draw_weights(50, 200, seed=1)
    assert (weights.sum(axis=1) == 50).all() and (weights == draw_weights(50, 200, seed=1)).all()
    assert weights.std() == pytest.approx(1, abs=0.05)
