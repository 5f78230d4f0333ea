"""The annotations of the experiment's scenes match the visible pixels."""

import gzip
import json
import struct

import cv2
import numpy as np
import pytest
from conftest import error_line, run_tool
from pycocotools import mask as mask_utils
from scipy import ndimage

from research.scenes import Figures, Garments, make_scene, put


class Marked:
    """Objects of one colour each, so that a scene shows their pixels."""

    pretraining, detection = ('none',), ('red', 'green', 'blue')

    def __init__(self) -> None:
        self.colours = [(0, 0, 255), (0, 255, 0), (255, 0, 0)]

    def draw(self, rng, category, split):
        figure = np.zeros((40, 60, 4), np.uint8)
        figure[..., :3] = self.colours[self.detection.index(category)]
        figure[5:35, 10:50, 3] = 255
        return figure


@pytest.mark.parametrize('seed', range(5))
def test_masks_are_the_visible_pixels(monkeypatch, seed):
    monkeypatch.setattr('research.scenes.draw_background', lambda rng, size: np.zeros((size, size, 3), np.uint8))
    monkeypatch.setattr('research.scenes.add_noise', lambda rng, image: image)
    source = Marked()
    image, annotations = make_scene(np.random.default_rng(seed), 96, source, 'train')
    assert annotations
    for category, colour in enumerate(source.colours, 1):
        own = [a for a in annotations if a['category_id'] == category]
        masks = [mask_utils.decode(a['segmentation']).astype(bool) for a in own]
        seen = (image == colour).all(axis=2)
        assert np.array_equal(np.sum(masks, axis=0) if masks else np.zeros_like(seen, int), seen.astype(int))
        for annotation, mask in zip(own, masks):
            rows, columns = ndimage.find_objects(mask.astype(int))[0]
            assert annotation['bbox'] == [
                columns.start,
                rows.start,
                columns.stop - columns.start,
                rows.stop - rows.start,
            ]
            assert annotation['area'] == mask.sum()


def test_objects_are_drawn_at_the_given_place():
    figure = Marked().draw(None, 'red', 'train')
    there = put(np.zeros((100, 100, 3), np.uint8), figure, (50, 40), 20, 90)  # 40 x 30 pixels, rotated upright
    rows, columns = ndimage.find_objects(there.astype(int))[0]
    assert abs(rows.stop - rows.start - 20) <= 1 and abs(columns.stop - columns.start - 15) <= 1
    assert np.allclose(ndimage.center_of_mass(there), (40, 50), atol=1)


def test_detected_categories_are_not_those_of_pretraining():
    figures = Figures()
    assert not {*figures.pretraining} & {*figures.detection}
    for names in (figures.pretraining, figures.detection):
        for place in (0, 1):  # each texture and each arrangement twice: neither predicts a category
            words = [name.split()[place] for name in names]
            assert all(words.count(word) == 2 for word in words)
    assert {*Garments.pretraining, *Garments.detection} == {*Garments.names}
    assert not {*Garments.pretraining} & {*Garments.detection}


def test_garments_are_pasted_from_their_own_split(monkeypatch, tmp_path):
    for prefix, value in (('train', 100), ('t10k', 200)):
        images = np.zeros((20, 28, 28), np.uint8)
        images[:, 6:22, 9:19] = value
        labels = np.arange(20, dtype=np.uint8) % 10
        for name, content in (
            (f'{prefix}-images-idx3', struct.pack('>4I', 2051, 20, 28, 28) + images.tobytes()),
            (f'{prefix}-labels-idx1', struct.pack('>2I', 2049, 20) + labels.tobytes()),
        ):
            (tmp_path / f'{name}-ubyte.gz').write_bytes(gzip.compress(content))
    garments = Garments(tmp_path)
    assert garments.images['val', 'bag'].max() == 200 and garments.images['train', 'bag'].max() == 100
    figure = garments.draw(np.random.default_rng(0), 'bag', 'val')
    assert (figure[..., 3] > 127).sum() == pytest.approx(9 * 160, rel=0.05)  # three times as large

    run_tool(monkeypatch, 'research.scenes', tmp_path / 'out', '--fashion-mnist', tmp_path, '--train', 3, '--val', 2,
             '--crops', 12)  # fmt: skip
    truth = json.loads((tmp_path / 'out/detection/annotations/instances_val.json').read_text())
    assert [category['name'] for category in truth['categories']] == list(Garments.detection)
    assert len(list((tmp_path / 'out/pretraining/train').rglob('*.png'))) == 12
    assert cv2.imread(str(tmp_path / 'out/detection/train/000001.png')).shape == (128, 128, 3)

    broken = tmp_path / 'train-images-idx3-ubyte.gz'
    broken.write_bytes(gzip.compress(gzip.decompress(broken.read_bytes())[:-1]))
    assert 'is corrupt' in error_line(monkeypatch, 'research.scenes', tmp_path / 'new', '--fashion-mnist', tmp_path)
    broken.unlink()
    assert 'dataset-fashion-mnist' in error_line(
        monkeypatch, 'research.scenes', tmp_path / 'new', '--fashion-mnist', tmp_path
    )
    assert not (tmp_path / 'new').exists()
