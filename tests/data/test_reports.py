"""Reports by users of such tools, rebuilt at a small size: prepare's cases in a folder outside this repository."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import copy_reports, run_tool
from PIL import Image

COLOURS = dict(red=(220, 30, 30), blue=(30, 30, 220))
# The expected result of each command of a case: the images written in each split, or a part of its one-line error.
CASES = {
    'cvat_subsets': [dict(train=14, val=4)],
    'cvat_yolo11': [dict(train=8, val=2)],
    'label_studio_percent': [dict(train=8, val=2)],
    'labelme_circle': [dict(train=8, val=2)] * 2,
    'labelme_macos': [dict(train=8, val=2)],
    'mixed_masks': ['5 of 20 objects have a box but no mask. Pass --masks from-boxes'],
    'xanylabeling': [dict(train=8, val=2)],
    'yolo_damaged_drop': ['003.png', dict(train=9, val=4)],
    'yolo_half_beside': [dict(train=8, val=2)],
    'yolo_names_quoted': [dict(train=12, val=12)],
    'yolo_own_split': [dict(train=10, val=4)],
    'yolo_pose_2d': [dict(train=6, val=3)],
    'yolo_txt_lists': [dict(train=10, val=4)],
}


def assert_boxes_are_where_the_colours_are(out: Path, split: str, count: int, case: str) -> None:
    """Compare an annotation file with the pixels: each image has a red and a blue rectangle."""
    coco = json.loads((out / f'annotations/instances_{split}.json').read_text())
    names = {category['id']: category['name'] for category in coco['categories']}
    assert len(coco['images']) == count
    for image in coco['images']:
        pixels = np.asarray(Image.open(out / split / image['file_name']).convert('RGB'))
        objects = [a for a in coco['annotations'] if a['image_id'] == image['id']]
        assert len(objects) == 2
        for annotation, (colour, value) in zip(objects, COLOURS.items(), strict=True):
            if case == 'yolo_names_quoted':  # image 001 has objects of class c00, and so on
                colour = f'c{int(Path(image["file_name"]).stem) - 1:02}'
            assert names[annotation['category_id']] == colour
            ys, xs = np.nonzero((pixels == value).all(2))
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            if not (case == 'labelme_circle' and colour == 'blue' and len(annotation['segmentation'][0]) > 8):
                np.testing.assert_allclose(annotation['bbox'], box, atol=0.5)


@pytest.mark.parametrize('case', CASES)
def test_a_reported_case(monkeypatch, tmp_path, capsys, case):
    monkeypatch.chdir(copy_reports(tmp_path / 'reports') / case)
    subprocess.run([sys.executable, 'make.py'], check=True)
    commands = re.findall('^spec-mmdet prepare (.+)$', Path('COMMAND').read_text(), re.MULTILINE)
    assert len(commands) == len(CASES[case])
    for command, expected in zip(commands, CASES[case]):
        shutil.rmtree('out', ignore_errors=True)
        if isinstance(expected, str):
            with pytest.raises(SystemExit, match=re.escape(expected)):
                run_tool(monkeypatch, 'prepare', *shlex.split(command))
            assert not Path('out').exists()
            continue
        run_tool(monkeypatch, 'prepare', *shlex.split(command))
        for split, count in expected.items():
            assert_boxes_are_where_the_colours_are(Path('out'), split, count, case)


@pytest.mark.parametrize(
    ('options', 'images', 'objects', 'masks'),
    [
        (['--masks', 'from-boxes'], 10, 20, 20),
        (['--masks', 'none'], 10, 20, 0),
        (['--drop'], 5, 10, 10),
        (['--drop-objects'], 10, 15, 15),
    ],
)
def test_mixed_boxes_and_polygons(monkeypatch, tmp_path, options, images, objects, masks):
    """Half of the images have an object without a mask; leaving out the object alone would make it background."""
    monkeypatch.chdir(copy_reports(tmp_path / 'reports') / 'mixed_masks')
    subprocess.run([sys.executable, 'make.py'], check=True)
    run_tool(monkeypatch, 'prepare', 'data', *options, '--val', 2, '--out', 'out')
    contents = [json.loads(path.read_text()) for path in Path('out/annotations').iterdir()]
    assert sum(len(coco['images']) for coco in contents) == images
    annotations = [annotation for coco in contents for annotation in coco['annotations']]
    assert len(annotations) == objects
    assert sum(bool(annotation.get('segmentation')) for annotation in annotations) == masks
