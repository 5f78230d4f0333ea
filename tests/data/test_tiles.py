"""Test tiles: objects are cut exactly, images of one split stay there, and the written data set is valid."""

import csv
import json

import cv2
import numpy as np
import pytest
from conftest import error_line, run_tool
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from spec_mmdet.data.tiles import MIN_SHARE, cut_object, place_tiles


@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 200), st.integers(0, 199))
def test_tiles_cover_an_image_and_overlap(width, height, size, overlap):
    overlap = min(overlap, size - 1)
    tiles = place_tiles(width, height, size, overlap)
    covered = np.zeros((height, width), int)
    for x0, y0, x1, y1 in tiles:
        assert 0 <= x0 and 0 <= y0 and (x1 - x0, y1 - y0) == (min(size, width), min(size, height))
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1 or len(tiles) > 1 and covered.min() >= 1
    rows = sorted({(y0, y1) for _, y0, _, y1 in tiles})
    assert all(end - start >= overlap for (_, end), (start, _) in zip(rows, rows[1:]))
    assert len(set(tiles)) == len(tiles)


def make_polygon(rng: np.random.Generator, side: int) -> list[float]:
    """Make a concave polygon without self-intersections: radii around a centre."""
    count = rng.integers(5, 30)  # gaps below half a turn
    angles = (np.arange(count) + rng.uniform(0, 1, count)) * 2 * np.pi / count
    radii = rng.uniform(2, 0.3 * side, count)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + rng.uniform(0.3, 0.7, 2) * side
    return points.ravel().tolist()


def shoelace(polygon: list[float]) -> float:
    x, y = np.reshape(polygon, (-1, 2)).T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def describe(polygon: list[float]) -> dict:
    x, y = np.reshape(polygon, (-1, 2)).T
    box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
    return dict(bbox=[float(v) for v in box], area=shoelace(polygon), iscrowd=0, segmentation=[polygon])


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([32, 64]))
def test_areas_of_parts_sum_up_to_that_of_the_object(seed, size):
    """Without overlap, for a polygon, for its mask and for its box alone; parts lie within their tiles."""
    side = 256
    annotation = describe(make_polygon(np.random.default_rng(seed), side))
    rle = mask_utils.merge(mask_utils.frPyObjects(annotation['segmentation'], side, side))
    (whole,) = mask_utils.decode([rle]).transpose(2, 0, 1)
    w, h = annotation['bbox'][2:]
    tiles = place_tiles(side, side, size, 0)
    for mask, total in ((annotation['segmentation'], annotation['area']), (rle, whole.sum()), (None, w * h)):
        parts = list(cut_object({**annotation, 'segmentation': mask}, tiles, side, side))
        assert sum(part['area'] for _, part, _ in parts) == pytest.approx(total, rel=1e-6, abs=1e-3)
        assert sum(share for *_, share in parts) == pytest.approx(1, abs=1e-6)
        for i, part, _ in parts:
            x, y, w, h = part['bbox']
            assert min(x, y) >= 0 and max(x + w, y + h) <= size + 2e-3
            if isinstance(mask, list):
                assert sum(map(shoelace, part['segmentation'])) == pytest.approx(part['area'], rel=0.01, abs=0.3)
            if isinstance(mask, dict):
                x0, y0, x1, y1 = tiles[i]
                assert (mask_utils.decode(part['segmentation']) == whole[y0:y1, x0:x1]).all()


def test_a_concave_object_falls_apart_and_an_intact_one_is_moved():
    """A U around the border of two tiles is a part of two polygons above, and one below; its holes stay background."""
    u = [10, 10, 30, 10, 30, 60, 70, 60, 70, 10, 90, 10, 90, 90, 10, 90]
    tiles = place_tiles(100, 100, 50, 0)
    wide = [(0, 0, 100, 50), (0, 50, 100, 100)]
    (i, above, share), (j, below, _) = cut_object(describe(u), wide, 100, 100)
    assert (i, j) == (0, 1) and len(above['segmentation']) == 2 and len(below['segmentation']) == 1
    assert above['area'] == 2 * 20 * 40 and above['bbox'] == [10, 10, 80, 40] and below['bbox'] == [10, 0, 80, 40]
    assert share == pytest.approx(1600 / (1600 + 2800))
    small = describe([60, 10, 80, 10, 80, 30]) | dict(area=123.0, keypoints=[60, 10, 2])
    ((i, part, share),) = cut_object(small, tiles, 100, 100)
    assert (i, share, part['area'], part['bbox']) == (1, 1, 123, [10, 10, 20, 20])
    assert part['segmentation'] == [[10, 10, 30, 10, 30, 30]] and 'keypoints' not in part


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """Write six images of 150 x 100 pixels of noise; each has the same objects, with a polygon, RLE, and a sliver."""
    root = tmp_path_factory.mktemp('large')
    (root / 'images').mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    crowd = np.zeros((100, 150), np.uint8)
    crowd[70:90, 10:60] = 1
    rle = mask_utils.encode(np.asfortranarray(crowd))
    rle['counts'] = rle['counts'].decode()
    for i in range(1, 7):
        suffix = 'bmp' if i == 6 else 'jpg' if i == 5 else 'png'
        cv2.imwrite(str(root / 'images' / f'{i}.{suffix}'), rng.integers(0, 256, (100, 150, 3), np.uint8))
        images.append(dict(id=f'image {i}', file_name=f'{i}.{suffix}', width=150, height=100))
        for fields in (
            describe([5, 5, 45, 5, 45, 45, 5, 45]),  # in the first tile
            describe([15, 15, 55, 15, 55, 45, 15, 45]),  # 35 x 30 in the first tile, 5 x 30 in the second
            dict(bbox=[10, 70, 50, 20], area=1000.0, iscrowd=1, segmentation=rle),
        ):
            annotations.append(dict(fields, id=f'object {len(annotations)}', image_id=f'image {i}', category_id=7))
    content = dict(images=images, annotations=annotations, categories=[dict(id=7, name='part')])
    (root / 'labels.json').write_text(json.dumps(content))
    return root


def test_tiles_of_a_data_set(monkeypatch, large, tmp_path, capsys):
    out = tmp_path / 'tiles'
    args = [large / 'images', '--annotations', large / 'labels.json', '--val', 2, '--seed', 1, '--out', out]
    run_tool(monkeypatch, 'prepare', *args, '--tiles', 50, '--overlap', 0, '--findings', tmp_path / 'all.csv')
    printed = capsys.readouterr().out
    assert 'train: 4 images cut into 4 tiles with 4 objects; 4 parts below 0.25' not in printed
    sources = {}
    for split, count, tiles in (('train', 4, 1), ('val', 2, 6)):
        coco = COCO(str(out / 'annotations' / f'instances_{split}.json'))
        assert len(coco.imgs) == count * tiles and f'{split}: {count} images cut into {count * tiles} tiles' in printed
        sources[split] = {image['file_name'].partition('_')[0] for image in coco.imgs.values()}
        for image in coco.imgs.values():
            source, x, y = image['file_name'].partition('.')[0].split('_')
            x, y = int(x), int(y)
            (original,) = (large / 'images').glob(f'{source}.*')
            pixels = cv2.imread(str(original))[y : y + 50, x : x + 50]
            tile = cv2.imread(str(out / split / image['file_name']))
            assert tile.shape == (image['height'], image['width'], 3) == (50, 50, 3)
            assert np.abs(pixels.astype(int) - tile).mean() < (12 if original.suffix == '.jpg' else 1e-9)
            found = coco.imgToAnns[image['id']]
            if (x, y) == (0, 0):
                assert [(a['bbox'], a['area'], a['iscrowd']) for a in found] == [
                    ([5, 5, 40, 40], 1600, 0),
                    ([15, 15, 35, 30], 1050, 0),
                ]
            elif (x, y) == (50, 0):  # an eighth of the object
                assert [(a['bbox'], a['area'], a['iscrowd']) for a in found] == [([0, 15, 5, 30], 150, 1)]
            elif y == 50:
                expected = {0: [[10, 20, 40, 20]], 50: [[0, 20, 10, 20]]}.get(x, [])
                assert [a['bbox'] for a in found] == expected and all(a['iscrowd'] for a in found)
            for annotation in found:
                assert coco.annToMask(annotation).sum() == annotation['area']
    assert len(sources['train']) == 4 and len(sources['val']) == 2 and not sources['train'] & sources['val']
    assert '20 tiles without objects were left out' in printed and '10 tiles without objects stay' in printed

    run_tool(monkeypatch, 'prepare', out, '--findings', tmp_path / 'found.csv')  # no errors
    with (tmp_path / 'found.csv').open() as file:
        assert not [row for row in csv.DictReader(file) if row['level'] == 'errors']
    assert MIN_SHARE == 0.25


def test_unusable_sizes(monkeypatch, large, tmp_path):
    args = ['prepare', large / 'images', '--annotations', large / 'labels.json', '--out', tmp_path / 'out']
    for options, says in (
        (['--overlap', 5], '--tiles SIZE'),
        (['--tiles', 16], 'at least 32'),
        (['--tiles', 64, '--overlap', 64], 'below SIZE'),
    ):
        assert says in error_line(monkeypatch, *args, *options)
    assert not (tmp_path / 'out').exists()
