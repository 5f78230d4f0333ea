"""The reader accepts annotation files in any encoding, and gives a one-line error for other files."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIG
from mmdet.registry import DATASETS, METRICS

from spec_mmdet.configs import read_config
from spec_mmdet.data import reading
from spec_mmdet.data.checks import check_inputs
from spec_mmdet.data.findings import Findings
from spec_mmdet.data.fitting import set_classes
from spec_mmdet.data.reading import AnnotationFile, forget_coco, read_coco, read_json
from spec_mmdet.data.tasks import use_folder
from spec_mmdet.errors import InputError


def coco(**changes) -> dict:
    image = dict(id=1, file_name='größe.png', width=40, height=30)
    box = dict(id=1, image_id=1, category_id=1, bbox=[4, 4, 20, 10], area=200, iscrowd=0)
    entries = dict(images=[image], annotations=[box], categories=[dict(id=1, name='红')], info={}, licenses=[])
    return {**entries, **changes}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32'])
def test_any_encoding(tmp_path, encoding):
    path = tmp_path / 'a.json'
    path.write_bytes(json.dumps(coco(), ensure_ascii=False).encode(encoding))
    assert read_coco(path) == coco()
    assert AnnotationFile(str(path)).dataset == coco()


def entry(key: str, **changes) -> str:
    content = coco()
    content[key][0].update(changes)
    return json.dumps(content)


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('[' * 200_000, 'nested too deep'),
        ('{"images": ' * 100_000, 'nested too deep'),
        ('{"images": [1', 'not JSON'),
        ('', 'not JSON'),
        ('\x00' * 50, 'not JSON'),
        (json.dumps(coco())[:-1] + ', "images": []}', 'the name "images" occurs twice in one object'),
        (json.dumps(coco()).replace('"id": 1, "image_id"', '"id": 1, "id": 2, "image_id"'), '"id" occurs twice'),
        ('{"images": [{"id": ' + '9' * 5000 + '}]}', 'not JSON'),
        ('"text"', 'no list "images"'),
        ('{"images": {}}', 'no list "images"'),
        (json.dumps(coco(images=[1])), 'no list "images"'),
        (entry('images', id=True), 'has the id True'),
        (entry('images', id=1.5), 'has the id 1.5'),
        (entry('images', id=None), 'has the id None'),
        (entry('images', file_name='a\0b.png'), "file_name 'a\\x00b.png', which is not valid text"),
        (entry('images', file_name='\ud800.png'), 'which is not valid text'),
        (entry('images', width=40.0), 'the width 40.0'),
        (entry('annotations', image_id=[1]), 'the image_id [1]'),
        (entry('annotations', bbox=None), 'the bbox None'),
        (entry('categories', name='\ud800'), 'which is not valid text'),
        (entry('categories', name=3), 'the name 3'),
    ],
    ids=range(21),
)
def test_a_file_that_is_not_coco_json_is_a_one_line_error(tmp_path, text, says):
    path = tmp_path / 'a.json'
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        read_coco(path)
    assert says in str(refused.value) and '\n' not in str(refused.value) and 'a.json' in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(path))


def test_missing_fields_are_filled_in_and_reported(tmp_path):
    square = [4, 4, 14, 4, 14, 14, 4, 14]
    boxes = [dict(id=i, image_id=1, category_id=1, bbox=[4, 4, 20, 10]) for i in range(3)]
    boxes[1]['segmentation'] = [square]
    boxes[2]['segmentation'] = [[1e30, 3, 20, 1e30, 30, 3]]
    path = tmp_path / 'a.json'
    path.write_text(json.dumps({k: v for k, v in coco(annotations=boxes).items() if k not in ('info', 'licenses')}))
    found = Findings()
    content = read_coco(path, found=found)
    assert [a['area'] for a in content['annotations']] == [200, 100, 200]
    assert [a['iscrowd'] for a in content['annotations']] == [0, 0, 0]
    assert content['info'] == {} and content['licenses'] == []
    assert sorted(map(len, found.notes.values())) == [1, 1, 3, 3] and not found.errors


def test_a_locale_that_is_not_utf_8(tmp_path):
    (tmp_path / 'annotations').mkdir()
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'größe.png').write_bytes(b'no image')
        (tmp_path / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco()))
    env = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    command = [sys.executable, '-m', 'spec_mmdet', 'prepare', str(tmp_path), '--findings', str(tmp_path / 'all.csv')]
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
    assert run.returncode == 1 and 'größe.png' in run.stderr.decode() and 'Traceback' not in run.stderr.decode()
    assert '红' in run.stdout.decode() and '红 in annotations/instances_val.json' not in run.stdout.decode()
    assert 'größe.png' in (tmp_path / 'all.csv').read_text('utf-8')


def test_a_training_reads_each_file_once(shapes, monkeypatch):
    """The check, the data sets and the evaluator share it; Python's garbage collector is paused meanwhile."""
    cfg, files = read_config(CONFIG), []
    use_folder(cfg, shapes, ('train', 'val'))

    def read(path: Path) -> object:
        assert not gc.isenabled()
        files.append(path.name)
        return read_json(path)

    monkeypatch.setattr(reading, 'read_json', read)
    for split in ('train', 'val'):
        forget_coco(shapes / 'annotations' / f'instances_{split}.json')  # of earlier tests
    set_classes(cfg, check_inputs(cfg, ('train', 'val')))
    datasets = [DATASETS.build(cfg[f'{loop}_dataloader'].dataset) for loop in ('train', 'val')]
    METRICS.build(cfg.val_evaluator)
    assert all(map(len, datasets)) and gc.isenabled()
    assert files == ['instances_train.json', 'instances_val.json']
