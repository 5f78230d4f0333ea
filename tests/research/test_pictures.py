"""Scenes of the README's pictures: objects are where their annotations say, and lie apart from each other."""

import numpy as np
from pycocotools import mask as mask_utils

from research.pictures import make_still_life


def test_objects_of_a_still_life():
    rng = np.random.default_rng(0)
    for _ in range(5):
        image, annotations = make_still_life(rng, 120)
        assert image.shape == (120, 120, 3) and 3 <= len(annotations) <= 7
        masks = [mask_utils.merge(mask_utils.frPyObjects(a['segmentation'], 120, 120)) for a in annotations]
        assert np.sum([mask_utils.decode(mask) for mask in masks], axis=0).max() == 1
        background = np.median(image.reshape(-1, 3), axis=0)
        for mask, annotation in zip(masks, annotations):
            np.testing.assert_allclose(mask_utils.toBbox(mask), annotation['bbox'], atol=3)
            inside = image[mask_utils.decode(mask).astype(bool)].astype(float)
            assert inside.std(axis=0).max() < np.abs(inside.mean(axis=0) - background).max()
