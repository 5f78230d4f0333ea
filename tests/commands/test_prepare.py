"""Prepare a labelling tool's file, train without editing a file, and check the messages about faulty data."""

import csv
import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, run_tool
from mmdet.apis import DetInferencer
from mmdet.registry import DATASETS
from mmdet.visualization import get_palette
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.data import shapes
from spec_mmdet.data.checks import check_inputs
from spec_mmdet.data.fitting import set_classes
from spec_mmdet.data.tasks import use_folder
from spec_mmdet.errors import InputError

CONFIG = ROOT / 'configs' / 'xcit_spec_shapes.py'
CLASSES = {17: 'bolt', 3: 'nut'}  # in the file's order, which is not the order of ids
SIZE = 96


@pytest.fixture(scope='module')
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """Write forty images in a folder and an annotation file beside it, as labelling tools do."""
    root = tmp_path_factory.mktemp('labelled')
    shapes.write_split(root, 'images', 40, SIZE, np.random.default_rng(0))
    ann_file = root / 'annotations' / 'instances_images.json'
    coco = json.loads(ann_file.read_text())
    for annotation in coco['annotations']:
        annotation['category_id'] = 17 if annotation['category_id'] <= 2 else 3
    coco['categories'] = [dict(id=index, name=name, supercategory='part') for index, name in CLASSES.items()]
    coco.update(info=dict(year=2024), licenses=[dict(id=1, name='ours')])
    ann_file.write_text(json.dumps(coco))
    return root / 'images', ann_file


@pytest.fixture(scope='module')
def good(tmp_path_factory, labelled) -> Path:
    """The same data in COCO's layout."""
    images, ann_file = labelled
    out = tmp_path_factory.mktemp('good') / 'data'
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, 'prepare', images, '--annotations', ann_file, '--val', 10, '--out', out)
    return out


def assert_part_of(part: Path, whole: Path) -> set[int]:
    """Compare an annotation file with its source, both read by pycocotools; return its image ids."""
    part, whole = COCO(str(part)), COCO(str(whole))
    for key in ('info', 'licenses', 'categories'):
        assert part.dataset.get(key) == whole.dataset.get(key)
    ids = part.getImgIds()
    assert part.loadImgs(ids) == whole.loadImgs(ids)
    for index in ids:
        assert part.loadAnns(part.getAnnIds(index)) == whole.loadAnns(whole.getAnnIds(index))
    assert len(part.anns) == len(whole.getAnnIds(ids))
    return set(ids)


def test_a_new_users_data_is_split_trained_on_and_tested(monkeypatch, labelled, good, tmp_path, capsys):
    images, ann_file = labelled
    parts = [assert_part_of(good / f'annotations/instances_{split}.json', ann_file) for split in ('train', 'val')]
    assert [len(part) for part in parts] == [30, 10] and len(parts[0] | parts[1]) == 40
    run_tool(monkeypatch, 'prepare', good)
    assert 'ready for training' in capsys.readouterr().out

    # No file is edited, and no path is absolute.
    monkeypatch.chdir(good.parent)
    few = ['--cfg-options', 'train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=8', 'param_scheduler.0.end=1']
    run_tool(monkeypatch, 'train', CONFIG, '--data', 'data', '--work-dir', tmp_path, *few)
    monkeypatch.chdir(tmp_path)
    checkpoint, config = load('epoch_1.pth'), Config.fromfile(CONFIG.name)
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == ('bolt', 'nut')
    assert checkpoint['state_dict']['roi_head.bbox_head.fc_cls.weight'].shape[0] == 3
    for loop in ('train', 'val', 'test'):
        assert config[f'{loop}_dataloader'].dataset.metainfo.classes == ('bolt', 'nut')

    def predict(*args) -> list[dict]:
        run_tool(monkeypatch, 'test', *args, 'epoch_1.pth', '--work-dir', 'test', '--out', 'predictions.pkl')
        return pickle.loads(Path('predictions.pkl').read_bytes())

    # The run's own config suffices, and with --data so does the config that it came from.
    for a, b in zip(predict(CONFIG.name), predict(CONFIG, '--data', good), strict=True):
        assert a['img_id'] == b['img_id'] and torch.equal(a['pred_instances']['bboxes'], b['pred_instances']['bboxes'])
        parts[1].remove(a['img_id'])
    assert not parts[1]
    inferencer = DetInferencer(CONFIG.name, 'epoch_1.pth', device='cpu', show_progress=False)
    assert tuple(inferencer.visualizer.dataset_meta['classes']) == ('bolt', 'nut')
    (found,) = inferencer(str(next(images.iterdir())), no_save_vis=True, return_datasamples=True)['predictions']
    assert set(found.pred_instances.labels.tolist()) <= {0, 1}
    run_tool(monkeypatch, 'predict', CONFIG.name, 'epoch_1.pth', good / 'val', '--out', 'drawn')
    assert len(list(Path('drawn').glob('*.png'))) == 10


def test_a_config_may_take_some_of_the_classes(good):
    cfg = Config.fromfile(CONFIG)
    use_folder(cfg, good, ('train', 'val', 'test'))
    for loop in ('train', 'val'):
        cfg[f'{loop}_dataloader'].dataset.metainfo = dict(classes=('nut',))
    assert check_inputs(cfg, ('train', 'val')) == ['nut']
    cfg.train_dataloader.dataset.metainfo = dict(classes=('nut', 'washer'))
    with pytest.raises(InputError, match='missing: washer'):
        check_inputs(cfg, ('train', 'val'))


def test_labels_follow_the_order_of_the_file(good):
    """The detector's class 0 is the file's first category, whatever its id."""
    cfg = Config.fromfile(CONFIG)
    use_folder(cfg, good, ('train', 'val', 'test'))
    cfg.model.rpn_head.num_classes = 1  # proposals, which have no class
    set_classes(cfg, list(CLASSES.values()))
    heads = cfg.model.rpn_head, cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head
    assert [head.num_classes for head in heads] == [1, 2, 2]
    truth = COCO(str(good / 'annotations/instances_val.json'))
    for item in DATASETS.build(cfg.val_dataloader.dataset).load_data_list():
        names = [cfg.val_dataloader.dataset.metainfo.classes[i['bbox_label']] for i in item['instances']]
        assert names == [CLASSES[a['category_id']] for a in truth.imgToAnns[item['img_id']]]


@pytest.mark.parametrize('count', [1, 80, 81])
def test_there_is_a_colour_for_each_class(good, count):
    cfg = Config.fromfile(CONFIG)
    use_folder(cfg, good, ('train', 'val', 'test'))
    set_classes(cfg, [f'class {i}' for i in range(count)])
    cfg = Config.fromstring(cfg.pretty_text, '.py')  # as when the run's own config is read
    metainfo = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True}).metainfo
    assert metainfo['classes'] == cfg.train_dataloader.dataset.metainfo.classes and len(metainfo['classes']) == count
    assert len(get_palette(metainfo['palette'], count)) >= count


@pytest.mark.parametrize(('amount', 'counts'), [('0.5', (15, 5)), ('7', (7, 7)), ('20', (20, 10))])
def test_subsets(monkeypatch, good, tmp_path, amount, counts):
    def subset(name: str, seed: int) -> list[set[int]]:
        out = tmp_path / name
        run_tool(monkeypatch, 'prepare', good, '--subset', amount, '--out', out, '--seed', seed)
        ids = []
        for split in ('train', 'val'):
            ann_file = f'annotations/instances_{split}.json'
            ids.append(assert_part_of(out / ann_file, good / ann_file))
            names = [image['file_name'] for image in json.loads((out / ann_file).read_text())['images']]
            assert {path.name for path in (out / split).iterdir()} == set(names)
            for name in names:
                assert (out / split / name).read_bytes() == (good / split / name).read_bytes()
        return ids

    first = subset('first', 0)
    assert tuple(map(len, first)) == counts
    assert subset('again', 0) == first != subset('other', 1)


def edit(change, split='train'):
    def spoil(root):
        path = root / f'annotations/instances_{split}.json'
        coco = json.loads(path.read_text())
        change(coco)
        path.unlink()
        path.write_text(json.dumps(coco))

    return spoil


def edit_object(split='train', **fields):
    """Change fields of the second object; a callable value gets the old one."""

    def change(coco):
        annotation = coco['annotations'][1]
        for key, value in fields.items():
            annotation[key] = value(annotation[key]) if callable(value) else value

    return edit(change, split)


def first_image(root: Path) -> Path:
    name = json.loads((root / 'annotations/instances_train.json').read_text())['images'][0]['file_name']
    return root / 'train' / name


def replace_image(save):
    """Replace the first image's file; ``save`` gets it as PIL reads it, and its path."""

    def spoil(root):
        path = first_image(root)
        image = Image.open(path).convert('RGB')
        path.unlink()
        save(image, path)

    return spoil


def truncated(image, path):
    image.save(path, 'jpeg', quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def with_orientation(image, path, size=(SIZE, SIZE)):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.resize(size).save(path, 'jpeg', exif=exif)


def turned(root):
    """Write an image that is wide in the file and high by its EXIF orientation, and labelled as wide."""
    replace_image(lambda image, path: with_orientation(image, path, (2 * SIZE, SIZE)))(root)
    edit(lambda coco: coco['images'][0].update(width=2 * SIZE))(root)


def rle(height: int, width: int, run: int) -> dict:
    return dict(size=[height, width], counts=[run, height * width - run])


COMPRESSED = mask_utils.encode(np.asfortranarray(np.ones((SIZE, 2 * SIZE), np.uint8)))['counts'].decode()
DEFECTS = {
    'missing image': (lambda root: first_image(root).unlink(), 'missing images'),
    'text for an image': (replace_image(lambda _, path: path.write_text('<html>')), 'corrupt or truncated'),
    'truncated JPEG': (replace_image(truncated), 'corrupt or truncated'),
    'other size': (replace_image(lambda image, path: image.resize((50, 60)).save(path)), 'images whose size differs'),
    'labelled unturned': (turned, 'labels that ignore the EXIF orientation'),
    'box too wide': (edit_object(bbox=[10, 10, SIZE - 7, 20]), 'boxes that extend beyond'),
    'box too far up': (edit_object(bbox=[10, -3, 20, 20]), 'boxes that extend beyond'),
    'negative box': (edit_object(bbox=[10, 10, -5, 5]), 'boxes of negative width or height'),
    'NaN in a box': (edit_object(bbox=[10, float('nan'), 5, 5]), 'not four finite numbers'),
    'box of two corners': (edit_object(bbox=[[1, 1], [9, 9]]), 'not four finite numbers'),
    'no area': (edit_object(area=0), '"area" is not above 0'),
    'no mask': (edit_object(segmentation=[]), 'objects without a mask'),
    'two points': (edit_object(segmentation=[[1, 1, 9, 9]]), 'polygons of fewer than 6 coordinates'),
    'odd polygon': (edit_object(segmentation=[[1, 1, 9, 9, 1, 9, 5]]), 'an odd number of them'),
    'polygon of points': (edit_object(segmentation=[[[1, 1], [9, 9], [1, 9]]]), 'polygons that are not lists'),
    'polygon outside': (edit_object(segmentation=[[1, 1, SIZE + 3, 9, 1, 9]]), 'polygons that extend beyond'),
    'mask of text': (edit_object(segmentation='none'), 'masks that are neither polygons nor RLE'),
    'RLE of other size': (edit_object(segmentation=rle(SIZE, SIZE + 1, 50)), 'RLE masks whose size'),
    'RLE too short': (edit_object(segmentation=dict(size=[SIZE, SIZE], counts=[9, 9])), 'whose runs do not sum up'),
    'RLE too long': (edit_object(segmentation=dict(size=[SIZE, SIZE], counts=COMPRESSED)), 'whose runs do not sum up'),
    'unknown category': (edit_object(category_id=1), 'unknown category_id'),
    'unknown image': (edit_object(image_id=777), 'unknown image_id'),
    'annotation twice': (
        edit(lambda coco: coco['annotations'].append(coco['annotations'][0])),
        'duplicate ids of annotations',
    ),
    'image twice': (edit(lambda coco: coco['images'].append(coco['images'][0])), 'duplicate ids of images'),
    'way out': (edit(lambda coco: coco['images'][0].update(file_name='../x.png')), 'outside of the image folder'),
    'no objects': (
        edit(lambda coco: coco['annotations'].clear(), 'val'),
        'splits without an object for evaluation; first: 0 of 0 annotations in annotations/instances_val.json',
    ),
}


@pytest.fixture
def spoilt(good, tmp_path) -> Path:
    """Copy the good folder; its files are copies too, because links would change the originals."""
    return Path(shutil.copytree(good, tmp_path / 'spoilt'))


@pytest.mark.parametrize(('spoil', 'says'), DEFECTS.values(), ids=DEFECTS)
def test_a_defect_is_named_counted_and_located(monkeypatch, spoilt, capsys, spoil, says):
    spoil(spoilt)
    assert 'not ready for training' in error_line(monkeypatch, 'prepare', spoilt)
    errors = capsys.readouterr().out.partition('errors, ')[2].partition('\n')[2].partition('\n\n')[0].splitlines()
    # The one fault is reported; others are its consequences.
    (line,) = (line for line in errors if says in line)
    assert line.split()[0] == '1' and '; first: ' in line
    assert len(errors) <= 2
    # Faulty items are left out.
    out = spoilt.parent / 'out'
    assert 'not ready' in error_line(monkeypatch, 'prepare', spoilt, '--subset', 100, '--out', out)
    assert not out.exists()


@pytest.mark.parametrize('option', ['--drop', '--drop-objects'])
def test_faulty_items_are_listed_and_dropped(monkeypatch, spoilt, tmp_path, capsys, option):
    replace_image(truncated)(spoilt)
    edit(lambda coco: coco['annotations'][-2].update(bbox=[-50, 0, 10, 10]))(spoilt)
    edit(lambda coco: coco['annotations'][-1].pop('bbox'))(spoilt)
    edit(lambda coco: coco['annotations'][9].update(area=0), 'val')(spoilt)
    train, val = (
        json.loads((spoilt / f'annotations/instances_{split}.json').read_text()) for split in ('train', 'val')
    )
    listing, out = tmp_path / 'all.csv', tmp_path / 'out'
    line = error_line(monkeypatch, 'prepare', spoilt, '--findings', listing)
    assert '4 errors in all' in line and str(listing) in line and 'instances_train.json' in line

    run_tool(monkeypatch, 'prepare', spoilt, option, '--out', out, '--findings', listing)
    rows = [row for row in csv.DictReader(listing.open(encoding='utf-8')) if row['level'] == 'left out']
    assert len(rows) == 4
    assert [row['annotation'] for row in rows if 'area' in row['kind']] == [str(val['annotations'][9]['id'])]
    assert [row['image'] for row in rows if 'truncated' in row['kind']] == [first_image(spoilt).name]
    gone = [{train['images'][0]['id']}, set()]
    if option == '--drop':  # an omitted object would become background in its image
        gone[0].add(train['annotations'][-2]['image_id'])
        gone[1].add(val['annotations'][9]['image_id'])
    for before, faulty, without, split in ((train, (-2, -1), gone[0], 'train'), (val, (9,), gone[1], 'val')):
        left = json.loads((out / f'annotations/instances_{split}.json').read_text())
        assert left['images'] == [image for image in before['images'] if image['id'] not in without]
        sound = [a for a in before['annotations'] if a['image_id'] not in without]
        assert left['annotations'] == [a for a in sound if a not in [before['annotations'][i] for i in faulty]]
    assert not (out / 'train' / first_image(spoilt).name).exists()
    capsys.readouterr()
    run_tool(monkeypatch, 'prepare', out)
    assert 'ready for training' in capsys.readouterr().out


def test_a_truncated_image_is_found_even_if_opencv_reads_it(monkeypatch, spoilt, capsys):
    replace_image(truncated)(spoilt)
    # Like OpenCV 4.10: return the decoded part, and grey for the rest.
    monkeypatch.setattr('mmcv.imfrombytes', lambda content, **kwargs: np.full((SIZE, SIZE, 3), 128, np.uint8))
    error_line(monkeypatch, 'prepare', spoilt)
    assert '1  corrupt or truncated images' in capsys.readouterr().out


def twin(source: str, target: str):
    def spoil(root):
        images = [next(iter(sorted((root / split).iterdir()))) for split in (source, target)]
        content = images[0].read_bytes()
        images[1].unlink()
        images[1].write_bytes(content)

    return spoil


DOUBTS = {
    'EXIF orientation': (replace_image(with_orientation), 'images with an EXIF orientation'),
    'flat box': (edit_object(bbox=[10, 10, 20, 0.0]), 'boxes narrower or lower than a pixel'),
    'same image in both': (twin('train', 'val'), 'validation images that also occur in the training split'),
    'class without objects': (
        edit(lambda coco: [annotation.update(category_id=17) for annotation in coco['annotations']]),
        'classes without an object; first: nut in annotations/instances_train.json',
    ),
    'image without objects': (
        edit(lambda coco: coco['images'].append(dict(coco['images'][0], id=99))),
        'images without an object',
    ),
    'same image twice': (edit(lambda coco: coco['images'].append(dict(coco['images'][0], id=99))), 'duplicate images'),
}


@pytest.mark.parametrize(('spoil', 'says'), DOUBTS.values(), ids=DOUBTS)
def test_a_warning_is_printed_and_does_not_stop(monkeypatch, spoilt, capsys, spoil, says):
    spoil(spoilt)
    run_tool(monkeypatch, 'prepare', spoilt)
    printed = capsys.readouterr().out
    assert says in printed.partition('warnings:\n')[2] and 'ready for training' in printed and 'errors' not in printed


@pytest.mark.parametrize('margin', [0, 1.5])
def test_objects_at_the_border_are_valid(monkeypatch, spoilt, capsys, margin):
    far = SIZE + margin
    polygon = [-margin, -margin, far, -margin, far, far]
    edit_object(bbox=[-margin, -margin, far + margin, far + margin], segmentation=[polygon])(spoilt)
    run_tool(monkeypatch, 'prepare', spoilt)
    assert 'ready for training' in capsys.readouterr().out


def test_the_checked_orientation_is_that_of_training(spoilt):
    """Images are rejected as rotated exactly if MMDetection would rotate them."""
    turned(spoilt)
    assert cv2.imread(str(first_image(spoilt))).shape[:2] == (2 * SIZE, SIZE)
    assert Image.open(first_image(spoilt)).size == (2 * SIZE, SIZE)


@pytest.mark.parametrize('value', ['0', '1.5', '-3', 'nan'])
def test_an_unusable_amount_is_explained(monkeypatch, tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        run_tool(monkeypatch, 'prepare', tmp_path, '--val', value)
    assert f'{value}: give a number of images' in ' '.join(capsys.readouterr().err.split())


def test_unusable_arguments(monkeypatch, labelled, good, spoilt, tmp_path):
    images, ann_file = labelled
    for args, says in (
        ([tmp_path / 'absent'], 'no such folder'),
        ([images], 'neither annotations/instances_train*.json nor'),
        ([good, '--subset', 3], 'need --out DIR'),
        ([good, '--val', 3], 'need --out DIR'),
        ([good, '--val', 3, '--out', tmp_path / 'out'], 'has images for validation already'),
        ([good, '--subset', 3, '--out', spoilt], 'exists already'),
        ([images, '--annotations', images / 'absent.json', '--out', tmp_path / 'out'], 'no such file'),
        ([images, '--annotations', ann_file, '--val', 40, '--out', tmp_path / 'out'], 'leaves none for training'),
    ):
        assert says in error_line(monkeypatch, 'prepare', *args)
    edit(lambda coco: coco['categories'].reverse(), 'val')(spoilt)
    assert 'their order' in error_line(monkeypatch, 'prepare', spoilt)
    edit(lambda coco: coco['categories'].reverse(), 'val')(spoilt)
    edit(lambda coco: coco['images'][0].update(width='96'))(spoilt)
    assert "has the width '96'" in error_line(monkeypatch, 'prepare', spoilt)
    shutil.rmtree(spoilt / 'annotations')
    assert 'lacks its annotation file' in error_line(monkeypatch, 'prepare', spoilt)
    assert not (tmp_path / 'out').exists()


def test_real_data_is_ready(monkeypatch, coco_mini, tmp_path, capsys):
    run_tool(monkeypatch, 'prepare', coco_mini)
    printed = capsys.readouterr().out
    assert 'ready for training' in printed and 'errors' not in printed
    for split in ('train2017', 'val2017'):
        coco = COCO(str(coco_mini / f'annotations/instances_{split}.json'))
        column = 1 if split == 'train2017' else 2
        for index, category in coco.cats.items():
            (row,) = (line for line in printed.splitlines() if line.startswith(f'{category["name"]} '))
            assert int(row.removeprefix(category['name']).split()[column - 1]) == len(coco.getAnnIds(catIds=index))
