"""What other formats hold is what was written in them; what cannot be read is named."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from spec_mmdet.data import shapes
from spec_mmdet.data.formats import read_folder
from spec_mmdet.data.splits import draw_for_validation
from spec_mmdet.errors import InputError

CLASSES = ['circle', 'square', 'triangle', 'star']


@pytest.fixture(scope='module')
def truth(tmp_path_factory) -> tuple[Path, dict]:
    """Six images of objects of one polygon each, and an image without an object."""
    root = tmp_path_factory.mktemp('truth')
    shapes.write_split(root, 'train', 6, 64, np.random.default_rng(0))
    coco = json.loads((root / 'annotations/instances_train.json').read_text())
    coco['annotations'] = [a for a in coco['annotations'] if not a['iscrowd'] and len(a['segmentation']) == 1]
    Image.new('RGB', (64, 48)).save(root / 'train' / 'empty.png')
    coco['images'].append(dict(id=99, file_name='empty.png', width=64, height=48))
    return root / 'train', coco


def objects(coco: dict) -> dict:
    return {
        image['file_name']: [a for a in coco['annotations'] if a['image_id'] == image['id']] for image in coco['images']
    }


def copy_images(truth, to: Path) -> None:
    to.mkdir(parents=True)
    for path in truth[0].iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def write_yolo(truth, root: Path, polygons: bool) -> None:
    copy_images(truth, root / 'images' / 'train')
    copy_images(truth, root / 'images' / 'val')
    sizes = {image['file_name']: (image['width'], image['height']) for image in truth[1]['images']}
    for split in ('train', 'val'):
        (root / 'labels' / split).mkdir(parents=True)
        for name, found in objects(truth[1]).items():
            lines, (w, h) = [], sizes[name]
            for a in found:
                x, y, bw, bh = a['bbox']
                values = [(x + bw / 2) / w, (y + bh / 2) / h, bw / w, bh / h]
                if polygons:
                    values = [v / (w, h)[i % 2] for i, v in enumerate(a['segmentation'][0])]
                lines.append(f'{a["category_id"] - 1} ' + ' '.join(map(repr, values)))
            if lines:  # an image without objects has no file
                (root / 'labels' / split / name).with_suffix('.txt').write_text('\n'.join(lines) + '\n')
    config = dict(path='/elsewhere', train='images/train', val='images/val', names=dict(enumerate(CLASSES)))
    (root / 'data.yaml').write_text(yaml.safe_dump(config))


def write_voc(truth, root: Path, images='JPEGImages', labels='Annotations') -> None:
    copy_images(truth, root / images)
    (root / labels).mkdir(exist_ok=True)
    for name, found in objects(truth[1]).items():
        top = ElementTree.Element('annotation')
        ElementTree.SubElement(top, 'filename').text = name
        for a in found:
            thing = ElementTree.SubElement(top, 'object')
            ElementTree.SubElement(thing, 'name').text = CLASSES[a['category_id'] - 1]
            ElementTree.SubElement(thing, 'difficult').text = '0'
            box = ElementTree.SubElement(thing, 'bndbox')
            x, y, w, h = a['bbox']
            for key, value in dict(xmin=x, ymin=y, xmax=x + w, ymax=y + h).items():
                ElementTree.SubElement(box, key).text = repr(value)
        ElementTree.ElementTree(top).write((root / labels / name).with_suffix('.xml'))


def write_labelme(truth, root: Path) -> None:
    copy_images(truth, root)
    for name, found in objects(truth[1]).items():
        content = [
            dict(label=CLASSES[a['category_id'] - 1], shape_type='polygon', group_id=None,
                 points=np.reshape(a['segmentation'][0], (-1, 2)).tolist())
            for a in found
        ]  # fmt: skip
        (root / name).with_suffix('.json').write_text(json.dumps(dict(version='5.5.0', imagePath=name, shapes=content)))


def assert_same(coco: dict, truth: dict, masks: bool) -> None:
    names = {category['id']: category['name'] for category in coco['categories']}
    read, wanted = objects(coco), objects(truth)
    assert set(read) == set(wanted)
    sizes = {image['file_name']: (image['width'], image['height']) for image in truth['images']}
    assert {image['file_name']: (image['width'], image['height']) for image in coco['images']} == sizes
    for name, found in wanted.items():
        assert [names[a['category_id']] for a in read[name]] == [CLASSES[a['category_id'] - 1] for a in found]
        for a, b in zip(read[name], found, strict=True):
            np.testing.assert_allclose(a['bbox'], b['bbox'], atol=0.011)
            assert ('segmentation' in a) == masks
            if masks:
                np.testing.assert_allclose(a['segmentation'], b['segmentation'], atol=0.002)
                assert a['area'] == pytest.approx(b['area'], abs=1)
            else:
                assert a['area'] == pytest.approx(b['bbox'][2] * b['bbox'][3], rel=1e-6)


@pytest.mark.parametrize('polygons', [False, True])
def test_yolo(truth, tmp_path, polygons):
    write_yolo(truth, tmp_path / 'yolo', polygons)
    name, read = read_folder(tmp_path / 'yolo')
    assert name == 'YOLO' and set(read) == {'train', 'val'}
    for coco, _ in read.values():
        assert [category['name'] for category in coco['categories']] == CLASSES
        assert_same(coco, truth[1], polygons)
    (tmp_path / 'yolo' / 'data.yaml').unlink()
    (tmp_path / 'yolo' / 'classes.txt').write_text('\n'.join(CLASSES))
    assert len(read_folder(tmp_path / 'yolo')[1]['all'][0]['images']) == 14


def test_pascal_voc(truth, tmp_path):
    write_voc(truth, tmp_path / 'voc')
    name, read = read_folder(tmp_path / 'voc')
    assert (name, set(read)) == ('Pascal VOC', {'all'})
    assert_same(read['all'][0], truth[1], masks=False)
    sets = tmp_path / 'voc' / 'ImageSets' / 'Main'
    sets.mkdir(parents=True)
    (sets / 'train.txt').write_text('000001\n000002 1\n')
    (sets / 'val.txt').write_text('000003\n')
    read = read_folder(tmp_path / 'voc')[1]
    assert [[image['file_name'] for image in read[s][0]['images']] for s in ('train', 'val')] == [
        ['000001.png', '000002.png'],
        ['000003.png'],
    ]
    # As Roboflow writes it: beside the images, split by split; the classes are the same in both.
    for split in ('train', 'valid'):
        write_voc(truth, tmp_path / 'beside' / split, '.', '.')
    read = read_folder(tmp_path / 'beside')[1]
    assert_same(read['val'][0], truth[1], masks=False)
    assert read['train'][0]['categories'] == read['val'][0]['categories']


def test_labelme(truth, tmp_path):
    write_labelme(truth, tmp_path / 'labelme')
    name, read = read_folder(tmp_path / 'labelme')
    assert (name, set(read)) == ('LabelMe', {'all'})
    assert_same(read['all'][0], truth[1], masks=True)


def test_what_is_no_known_format(truth, tmp_path):
    copy_images(truth, tmp_path / 'images')
    assert read_folder(tmp_path) is None


@pytest.mark.parametrize(
    ('line', 'says'),
    [
        ('9 0.5 0.5 0.1 0.1', '000001.txt, line 1: class 9, of 4 classes'),
        ('0.5 0.5 0.5 0.1 0.1', 'line 1: class 0.5'),
        ('0 0.5 0.5 0.1', 'line 1: 3 numbers after the class'),
        ('0 0.5 0.5 0.1 0.1 0.2 0.3 0.4', 'line 1: 7 numbers after the class'),
        ('0 0.5 zero 0.1 0.1', "line 1: 'zero' is no number"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(truth, tmp_path, line, says):
    write_yolo(truth, tmp_path / 'yolo', False)
    (tmp_path / 'yolo/labels/train/000001.txt').write_text(line)
    with pytest.raises(InputError, match=says):
        read_folder(tmp_path / 'yolo')


def test_images_are_as_their_exif_turns_them(tmp_path):
    (tmp_path / 'images').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (80, 40)).save(tmp_path / 'images' / 'turned.jpg', exif=exif)
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'labels' / 'turned.txt').write_text('0 0.5 0.5 1 0.5')
    (tmp_path / 'classes.txt').write_text('thing\n')
    coco = read_folder(tmp_path)[1]['all'][0]
    assert (coco['images'][0]['width'], coco['images'][0]['height']) == (40, 80)
    assert coco['annotations'][0]['bbox'] == [0, 20, 40, 40]


@pytest.mark.parametrize('seed', range(5))
def test_every_class_is_on_both_sides_where_it_can_be(seed):
    rng = np.random.default_rng(seed)
    images = [dict(id=i) for i in range(50)]
    annotations = [dict(image_id=i, category_id=int(c)) for i in range(50) for c in rng.zipf(1.6, 2) if c < 30]
    for rare, holders in ((100, [3, 40]), (101, [7]), (102, [3, 7, 9])):
        annotations += [dict(image_id=i, category_id=rare) for i in holders]
    coco = dict(images=images, annotations=annotations)
    chosen = draw_for_validation(coco, 15, seed)
    assert len(chosen) == 15 and chosen == draw_for_validation(coco, 15, seed)
    for category in {a['category_id'] for a in annotations}:
        holders = {a['image_id'] for a in annotations if a['category_id'] == category}
        assert holders - chosen, f'{category} is not left for training'
        # Image 7 has the only object of 101, and stays with all that it has.
        if len(holders - {7}) > 1:
            assert holders & chosen, f'{category} is not in validation'
