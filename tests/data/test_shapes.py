"""The generated data set is deterministic COCO, and its polygons cover the drawn shapes."""

import json

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from shapely.geometry import Point

from spec_mmdet.data import shapes


def test_the_same_seed_writes_the_same_files(tmp_path):
    for folder in ('a', 'b'):
        shapes.write_split(tmp_path / folder, 'train', 3, 96, np.random.default_rng(7))
    shapes.write_split(tmp_path / 'c', 'train', 3, 96, np.random.default_rng(8))
    files = {p.relative_to(tmp_path / 'a') for p in (tmp_path / 'a').rglob('*') if p.is_file()}
    assert len(files) == 4
    for name in files:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
        assert (tmp_path / 'a' / name).read_bytes() != (tmp_path / 'c' / name).read_bytes()


def test_the_whole_data_set(tmp_path, capsys):
    shapes.write_shapes(tmp_path / 'shapes', train=3, val=2, size=96, seed=7)
    assert '3 training and 2 validation images of 96 pixels' in capsys.readouterr().out
    for i, (split, images) in enumerate(dict(train=3, val=2).items()):
        shapes.write_split(tmp_path / 'alone', split, images, 96, np.random.default_rng([7, i]))
    files = [path.relative_to(tmp_path / 'alone') for path in (tmp_path / 'alone').rglob('*') if path.is_file()]
    assert len(files) == 7
    assert all((tmp_path / 'alone' / name).read_bytes() == (tmp_path / 'shapes' / name).read_bytes() for name in files)


def test_annotations_agree_with_their_masks(tmp_path):
    shapes.write_split(tmp_path, 'val', 60, 128, np.random.default_rng(1))
    path = tmp_path / 'annotations' / 'instances_val.json'
    coco = COCO(str(path))
    annotations = json.loads(path.read_text())['annotations']
    assert {a['category_id'] for a in annotations} == {1, 2, 3, 4}
    crowds = [a for a in annotations if a['iscrowd']]
    assert crowds
    for image_id in coco.imgs:
        covered = np.zeros((128, 128), int)
        for annotation in coco.imgToAnns[image_id]:
            mask = coco.annToMask(annotation)
            covered += mask
            x, y, w, h = annotation['bbox']
            assert 0 <= x and 0 <= y and x + w <= 128 and y + h <= 128
            rows, columns = np.nonzero(mask)
            # Rasterising blunts the tip of a star or triangle by some pixels.
            assert abs(columns.min() - x) <= 3 and abs(columns.max() + 1 - x - w) <= 3
            assert abs(rows.min() - y) <= 3 and abs(rows.max() + 1 - y - h) <= 3
            assert abs(mask.sum() - annotation['area']) <= 0.12 * annotation['area'] + 12
        assert (covered > 1).mean() < 0.02  # masks contain visible pixels, so they meet only along their outlines
    assert all(mask_utils.area(a['segmentation']) == a['area'] for a in crowds)


def test_holes_are_cut_open():
    ring = Point(0, 0).buffer(10).difference(Point(0, 0).buffer(4))
    parts = shapes.cut_into_polygons(ring)
    assert len(parts) == 2 and not any(part.interiors for part in parts)
    assert abs(sum(part.area for part in parts) - ring.area) < 1e-9
