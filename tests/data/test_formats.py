"""One ground truth is written in every supported export format and read with its boxes and classes; so are faults."""

import base64
import html
import io
import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from spec_mmdet.data.findings import Findings
from spec_mmdet.data.formats import READERS, find_splits
from spec_mmdet.data.splits import check_splits, draw_for_validation, drop_faulty
from spec_mmdet.errors import InputError

CLASSES = ['zebra', 'größe 2', 'apfel']  # in no particular order
TRAIN, VAL, TEST = 'train', 'val', 'test'


@dataclass
class Item:
    """An image and its objects: each has the number of its class and a polygon of integer corners."""

    name: str
    size: tuple[int, int]
    split: str
    objects: list[tuple[int, list[int]]]

    @property
    def stem(self) -> str:
        return self.name.removesuffix('.png')

    @property
    def boxes(self) -> list[tuple[str, list[float]]]:
        return [(CLASSES[k], [min(p[::2]), min(p[1::2]), np.ptp(p[::2]), np.ptp(p[1::2])]) for k, p in self.objects]


def make_items() -> list[Item]:
    names = ['photo 1', 'größe', 'a.b', '007', '0_1', 'x', 'y', 'z']
    splits = [TRAIN] * 4 + [VAL] * 2 + [TEST] * 2
    rng, items = np.random.default_rng(0), []
    for i, (name, split) in enumerate(zip(names, splits)):
        width, height = 64 + i, 90 - 2 * i
        objects = []
        for k in range(1 + (i > 0) + (i > 3)):
            x, y = rng.integers(2, 20, 2).tolist()
            w, h = rng.integers(12, 40, 2).tolist()
            objects.append(((i + k) % 3, [x, y + 3, x + w, y, x + w - 2, y + h, x + 4, y + h - 2]))
        items.append(Item(f'{name}.png', (width, height), split, objects))
    items[5].objects.clear()
    return items


ITEMS = make_items()


def picture(item: Item) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(len(item.name)).integers(0, 255, (*item.size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, 'png')
    return buffer.getvalue()


def put(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')


def put_images(folder: Path, items=ITEMS) -> None:
    for item in items:
        put(folder / item.name, picture(item))


def of(split: str) -> list[Item]:
    return [item for item in ITEMS if item.split == split]


def box_of(polygon) -> list[int]:
    return [min(polygon[::2]), min(polygon[1::2]), int(np.ptp(polygon[::2])), int(np.ptp(polygon[1::2]))]


# Writers. Each writes all items and returns the splits to be read: {split: items}.
WHOLE = dict(all=ITEMS)
SPLITS = {split: of(split) for split in (TRAIN, VAL, TEST)}
WRITERS = {}


def writer(expected, masks=False, **options):
    def register(write):
        WRITERS[write.__name__] = write, expected, masks, options
        return write

    return register


def coco(items, prefix='', first=1) -> dict:
    images, annotations = [], []
    for i, item in enumerate(items, first):
        images.append(dict(id=i, file_name=prefix + item.name, width=item.size[0], height=item.size[1]))
        for k, polygon in item.objects:
            annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=k + 1, bbox=box_of(polygon),
                                    area=9, iscrowd=0, segmentation=[polygon]))  # fmt: skip
    categories = [dict(id=k, name=name, supercategory='') for k, name in enumerate(CLASSES, 1)]
    return dict(images=images, annotations=annotations, categories=categories)


@writer(SPLITS, masks=True)
def coco_2017(root):
    for split, items in SPLITS.items():
        put_images(root / f'{split}2017', items)
        put(root / 'annotations' / f'instances_{split}2017.json', coco(items))


@writer(SPLITS, masks=True)
def roboflow_coco(root):
    for split, items in SPLITS.items():
        folder = root / ('valid' if split == VAL else split)
        put_images(folder, items)
        content = coco(items)
        for category in content['categories']:
            category['supercategory'] = 'animals'
        content['categories'].insert(0, dict(id=0, name='animals', supercategory='none'))
        put(folder / '_annotations.coco.json', content)


@writer(WHOLE, masks=True)
def cvat_coco(root):
    put_images(root / 'images' / 'default')
    put(root / 'annotations/instances_default.json', coco(ITEMS))


@writer(WHOLE, masks=True)
def cvat_coco_subsets(root):
    for i, items in enumerate(SPLITS.values()):
        put_images(root / 'images' / f'batch{i}', items)
        put(root / f'annotations/instances_batch{i}.json', coco(items))


@writer(SPLITS, masks=True)
def cvat_coco_splits(root):
    for name, items in zip(('Train', 'Validation', 'Test'), SPLITS.values()):
        put_images(root / 'images' / name, items)
        put(root / f'annotations/instances_{name}.json', coco(items))


@writer(WHOLE, masks=True)
def label_studio_coco(root):
    put_images(root / 'images')
    put(root / 'result.json', coco(ITEMS, 'images\\'))


@writer(WHOLE, masks=True)
def label_studio_local_files(root):
    put_images(root / 'images')
    content = coco(ITEMS)
    for image in content['images']:
        image['file_name'] = '/data/local-files/?d=my%20pictures/' + image['file_name'].replace(' ', '%20')
    put(root / 'result.json', content)


@writer(WHOLE, masks=True)
def fiftyone_coco(root):
    put_images(root / 'data')
    put(root / 'labels.json', coco(ITEMS))


@writer(SPLITS, masks=True)
def coco_one_image_folder(root):
    for split, items in SPLITS.items():
        put_images(root / 'images', items)
        put(root / f'{split}.json', coco(items))


@writer(WHOLE, masks=True)
def enclosing_folder(root):
    label_studio_coco(root / 'project-1' / 'export')
    put(root / '__MACOSX' / '._x', b'x')


@writer(WHOLE, masks=True)
def zipped(root):
    label_studio_coco(root / 'inside')
    shutil.make_archive(str(root / 'export'), 'zip', root / 'inside')
    shutil.rmtree(root / 'inside')


@writer(WHOLE, masks=True)
def zipped_on_windows(root):
    label_studio_coco(root / 'inside')
    with zipfile.ZipFile(root / 'export.zip', 'w') as archive:
        for path in (root / 'inside').rglob('*.*'):
            archive.writestr(str(path.relative_to(root / 'inside')).replace('/', '\\'), path.read_bytes())
    shutil.rmtree(root / 'inside')


@writer(SPLITS, masks=True)
def lvis(root):
    for split, items in SPLITS.items():
        put_images(root / f'{split}2017', items)
        content = coco(items)
        for image in content['images']:
            image['coco_url'] = f'http://images.cocodataset.org/{split}2017/{image.pop("file_name")}'
        put(root / f'lvis_v1_{split}.json', content)


@writer(SPLITS, masks=True)
def coco_names_of_files(root):
    for split, items in SPLITS.items():
        put_images(root / 'images', items)
        put(root / f'annotations_{split}.json', coco(items))


def yolo_text(item, shape='box') -> str:
    lines, (width, height) = [], item.size
    for k, polygon in item.objects:
        x, y, w, h = box_of(polygon)
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
        fractions = [v / item.size[i % 2] for i, v in enumerate(polygon)]
        values = dict(box=values, polygon=fractions, pose=values + fractions)[shape]
        lines.append(f'{k} ' + ' '.join(f'{v:.6f}' for v in values))
    return '\n'.join(lines)


def put_yolo(images, labels, items=ITEMS, shape='box') -> None:
    put_images(images, items)
    for item in items:
        if item.objects:
            put(labels / f'{item.stem}.txt', yolo_text(item, shape))


def put_yaml(path, /, **content) -> None:
    put(path, yaml.safe_dump(dict(names=dict(enumerate(CLASSES))) | content, allow_unicode=True))


def put_ultralytics(root, shape='box') -> None:
    for split, items in SPLITS.items():
        put_yolo(root / 'images' / split, root / 'labels' / split, items, shape)


@writer(SPLITS)
def ultralytics(root):
    put_ultralytics(root)
    put_yaml(root / 'data.yaml', path='/elsewhere', nc=3, **{split: f'images/{split}' for split in SPLITS})


@writer(SPLITS, masks=True)
def ultralytics_polygons(root):
    put_ultralytics(root, 'polygon')
    put_yaml(root / 'data.yaml', path='.', **{split: f'images/{split}' for split in SPLITS})


@writer(SPLITS)
def ultralytics_pose(root):
    put_ultralytics(root, 'pose')
    put_yaml(root / 'data.yaml', path='.', kpt_shape=[4, 2], **{split: f'images/{split}' for split in SPLITS})


def put_lists(root, prefix):
    """Write Ultralytics' layout with a list of images for each split, whose paths start with ``prefix``."""
    put_ultralytics(root)
    put_yaml(root / 'data.yaml', path='.', **{split: f'{split}.txt' for split in SPLITS})
    for split, items in SPLITS.items():
        put(root / f'{split}.txt', '\n'.join(f'{prefix}/images/{split}/{item.name}' for item in items))


@writer(SPLITS)
def yolo_lists(root):
    put_lists(root, '.')


@writer(SPLITS)
def ultralytics_yaml_lists(root):
    put_ultralytics(root)
    shutil.copytree(root / 'images/train', root / 'images/more')
    shutil.copytree(root / 'labels/train', root / 'labels/more')
    for folder, item in (('more', ITEMS[0]), ('train', ITEMS[1]), ('train', ITEMS[2]), ('train', ITEMS[3])):
        (root / 'images' / folder / item.name).unlink()
        (root / 'labels' / folder / f'{item.stem}.txt').unlink()
    splits = dict(train=['images/train', 'images/more'], val=['images/val'], test='images/test')
    put_yaml(root / 'data.yaml', path='.', **splits)


@writer(SPLITS)
def ultralytics_absolute(root):
    put_ultralytics(root.with_name('pictures'))
    put_yaml(root / 'data.yaml', **{split: str(root.with_name('pictures') / 'images' / split) for split in SPLITS})


@writer(SPLITS)
def ultralytics_moved(root):
    """Absolute paths of another machine, some of Windows."""
    put_ultralytics(root)
    put_yaml(root / 'data.yaml', train='C:\\data\\mine\\images\\train', val='/home/x/mine/images/val', test='test.txt')
    put(root / 'test.txt', '\n'.join(f'/content/mine/images/test/{item.name}' for item in of(TEST)))


@writer(SPLITS)
def cvat_ultralytics(root):
    put_lists(root, 'data')


@writer(SPLITS)
def roboflow_yolo(root):
    for split, items in SPLITS.items():
        folder = root / ('valid' if split == VAL else split)
        put_yolo(folder / 'images', folder / 'labels', items)
    put_yaml(root / 'data.yaml', names=CLASSES, nc=3, train='../train/images', val='../valid/images',
             test='../test/images')  # fmt: skip
    put(root / 'README.roboflow.txt', 'exported')


@writer(SPLITS)
def quoted_names(root):
    put_ultralytics(root)
    names = ''.join(f"  '{i}': {name}\n" for i, name in reversed(list(enumerate(CLASSES))))
    put(root / 'data.yaml', f'train: images/train\nval: images/val\ntest: images/test\nnames:\n{names}')


@writer(SPLITS)
def fiftyone_yolo5(root):
    put_ultralytics(root)
    put_yaml(root / 'dataset.yaml', path=str(root), **{split: f'./images/{split}/' for split in SPLITS})


@writer(dict(train=of(TRAIN) + of(VAL), test=of(TEST)))
def cvat_yolo_1_1(root):
    for split, items in (('train', of(TRAIN) + of(VAL)), ('test', of(TEST))):
        put_yolo(root / f'obj_{split}_data', root / f'obj_{split}_data', items)
        put(root / f'{split}.txt', '\n'.join(f'data/obj_{split}_data/{item.name}' for item in items))
    put(root / 'obj.names', '\n'.join(CLASSES))
    put(root / 'obj.data', 'classes = 3\ntrain = data/train.txt\ntest = data/test.txt\nnames = data/obj.names\n')


@writer(WHOLE)
def labelimg(root):
    put_yolo(root, root)
    put(root / 'classes.txt', '\n'.join(CLASSES) + '\n')


@writer(WHOLE)
def label_studio_yolo(root):
    put_yolo(root / 'images', root / 'labels')
    put(root / 'classes.txt', '\r\n'.join(CLASSES))
    put(root / 'notes.json', dict(categories=[dict(id=0, name='x')], info={}))


@writer(SPLITS)
def own_split(root):
    put_ultralytics(root)
    put(root / 'labels' / 'classes.txt', '\n'.join(CLASSES))


@writer(SPLITS)
def roboflow_darknet(root):
    for split, items in SPLITS.items():
        folder = root / ('valid' if split == VAL else split)
        put_yolo(folder, folder, items)
        put(folder / '_darknet.labels', '\n'.join(CLASSES))


@writer(SPLITS)
def yolo_split_beside_kind(root):
    for split, items in SPLITS.items():
        put_yolo(root / f'{split}_images', root / f'{split}_labels', items)
    put(root / 'labels.txt', '\n'.join(CLASSES))


@writer(dict(train=ITEMS, val=ITEMS))
def yolo_gaps_in_numbers(root):
    put_yolo(root / 'images', root / 'labels')
    for path in (root / 'labels').iterdir():
        path.write_text(re.sub('^[012]', lambda m: '037'[int(m[0])], path.read_text(), flags=re.MULTILINE))
    put_yaml(root / 'data.yaml', names=dict(zip((0, 3, 7), CLASSES)), train='images', val='images')


@writer(WHOLE)
def names_in_upper_case(root):
    put_yolo(root / 'images', root / 'labels')
    put(root / 'classes.txt', '\n'.join(CLASSES))
    for path in [*(root / 'images').iterdir(), *(root / 'labels').iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))


@writer(WHOLE)
def makesense(root):
    put_yolo(root / 'images', root / 'labels_my-project_2026-01-01')
    put(root / 'labels_my-project_2026-01-01' / 'labels.txt', '\n'.join(CLASSES))


@writer(SPLITS)
def darknet_other_names(root):
    for split, items in SPLITS.items():
        put_yolo(root / 'data', root / 'data', items)
        put(root / f'{split}.list', '\n'.join(f'data/{item.name}' for item in items))
    put(root / 'animals.names', '\n'.join(CLASSES))
    put(root / 'animals.data', 'train = train.list\nvalid = val.list\ntest = test.list\nnames = animals.names\n')


@writer(WHOLE)
def labels_in_two_places(root):
    put_yolo(root / 'images', root / 'labels', ITEMS[:4])
    put_yolo(root / 'images', root / 'images', ITEMS[4:])
    put(root / 'classes.txt', '\n'.join(CLASSES))


@writer(SPLITS)
def flat_labels(root):
    put_ultralytics(root)
    for path in sorted((root / 'labels').rglob('*.txt')):
        path.rename(root / 'labels' / path.name)
    put_yaml(root / 'data.yaml', **{split: f'images/{split}' for split in SPLITS})


def voc_text(item, first=1, head='<?xml version="1.0"?>', name=None) -> str:
    text = f'{head}<annotation><filename>{html.escape(name or item.name)}</filename><size><width>{item.size[0]}</width>'
    text += f'<height>{item.size[1]}</height><depth>3</depth></size>'
    for k, polygon in item.objects:
        x, y, w, h = box_of(polygon)
        text += f'<object><name>{CLASSES[k]}</name><difficult>0</difficult><bndbox><xmin>{x + first}</xmin>'
        text += f'<ymin>{y + first}</ymin><xmax>{x + w + first}</xmax><ymax>{y + h + first}</ymax></bndbox>'
        text += '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>'
    return text + '</annotation>'


def put_voc(images, labels, items=ITEMS, **options) -> None:
    put_images(images, items)
    for item in items:
        put(labels / f'{item.stem}.xml', voc_text(item, **options))


@writer(dict(all=of(TRAIN) + of(VAL), test=of(TEST)))
def voc_trainval_test(root):
    put_voc(root / 'JPEGImages', root / 'Annotations')
    put(root / 'ImageSets/Main/trainval.txt', '\n'.join(item.stem for item in of(TRAIN) + of(VAL)))
    put(root / 'ImageSets/Main/test.txt', '\n'.join(item.stem for item in of(TEST)))
    put(root / 'ImageSets/Main/zebra_trainval.txt', '\n'.join(f'{item.stem}  1' for item in ITEMS))


@writer(SPLITS)
def voc_lists(root):
    put_voc(root / 'JPEGImages', root / 'Annotations')
    for split, items in SPLITS.items():
        put(root / f'ImageSets/Main/{split}.txt', '\n'.join(f'{item.stem} 1' for item in items))
    put(root / 'ImageSets/Main/trainval.txt', '\n'.join(item.stem for item in of(TRAIN) + of(VAL)))


@writer(SPLITS)
def voc_of_two_years(root):
    for year, split in (('VOC2007', TRAIN), ('VOC2007', TEST), ('VOC2012', VAL)):
        put_voc(root / year / 'JPEGImages', root / year / 'Annotations', SPLITS[split])
        put(root / year / f'ImageSets/Main/{split}.txt', '\n'.join(item.stem for item in SPLITS[split]))
    put_voc(root / 'VOC2012/JPEGImages', root / 'VOC2012/Annotations', ITEMS[:1])  # the name of one of VOC2007


@writer(SPLITS)
def voc_lists_of_paths(root):
    put_voc(root / 'JPEGImages', root / 'Annotations')
    for split, items in SPLITS.items():
        lines = [f'./JPEGImages/{item.name} ./Annotations/{item.stem}.xml' for item in items]
        put(root / f'{split}_list.txt', '\n'.join(lines))


@writer(SPLITS)
def imagenet_detection(root):
    for split, items in SPLITS.items():
        put_voc(root / 'Data/DET' / split, root / 'Annotations/DET' / split, items)
        put(root / f'ImageSets/DET/{split}.txt', '\n'.join(f'{item.stem} {i}' for i, item in enumerate(items, 1)))


@writer(WHOLE)
def voc_masks_of_segments(root):
    put_voc(root / 'JPEGImages', root / 'Annotations')
    put_images(root / 'SegmentationClass')
    put_images(root / 'SegmentationObject')


@writer(WHOLE)
def voc_two_suffixes(root):
    """Two images with the same name: <filename> says which one is labelled."""
    put_voc(root / 'JPEGImages', root / 'Annotations')
    Image.new('RGB', (9, 9)).save(root / 'JPEGImages' / '007.jpg')


@writer(WHOLE)
def cvat_voc(root):
    put_voc(root / 'JPEGImages', root / 'Annotations')
    put(root / 'ImageSets/Main/default.txt', '\n'.join(item.stem for item in ITEMS))
    put(root / 'labelmap.txt', '# label:color_rgb:parts:actions\n')


@writer(WHOLE, zero_based=True)
def voc_from_zero(root):
    put_voc(root, root, first=0)


@writer(SPLITS)
def roboflow_voc(root):
    for split, items in SPLITS.items():
        put_voc(root / ('valid' if split == VAL else split), root / ('valid' if split == VAL else split), items)


@writer(WHOLE)
def fiftyone_voc(root):
    put_voc(root / 'data', root / 'labels')


@writer(WHOLE)
def voc_latin_1(root):
    put_images(root)
    for i, item in enumerate(ITEMS):
        head = '<?xml version="1.0" encoding="ISO-8859-1"?>' if i % 2 else ''
        put(root / f'{item.stem}.xml', voc_text(item, head=head).encode('latin-1'))


def labelme(item, shape='polygon', **fields) -> dict:
    shapes = []
    for k, polygon in item.objects:
        x, y, w, h = box_of(polygon)
        points = np.reshape(polygon, (-1, 2)).tolist()
        if shape == 'rectangle':
            points = [[x + w, y], [x, y + h]]
        if shape == 'four':
            points = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
        if shape == 'mask':
            points = [[x, y], [x + w - 1, y + h - 1]]
        shapes.append(dict(label=CLASSES[k], points=points, shape_type='rectangle' if shape == 'four' else shape,
                           group_id=None))  # fmt: skip
        if shape == 'mask':
            buffer = io.BytesIO()
            Image.fromarray(np.full((h, w), 255, np.uint8)).save(buffer, 'png')
            shapes[-1]['mask'] = base64.b64encode(buffer.getvalue()).decode()
    return dict(version='5.5.0', shapes=shapes, imagePath=item.name, imageData=None, imageHeight=item.size[1],
                imageWidth=item.size[0]) | fields  # fmt: skip


@writer(WHOLE, masks=True)
def labelme_polygons(root):
    put_images(root)
    for item in ITEMS:
        put(root / f'{item.stem}.json', labelme(item))
        put(root / f'._{item.stem}.json', b'\0\5\26\7')
    put(root / '.ipynb_checkpoints' / f'{ITEMS[0].stem}.json', labelme(ITEMS[0]))


@writer(WHOLE)
def labelme_rectangles(root):
    put_images(root)
    for i, item in enumerate(ITEMS):
        put(root / f'{item.stem}.json', labelme(item, ('rectangle', 'four')[i % 2]))


@writer(WHOLE, masks=True)
def labelme_masks(root):
    put_images(root)
    for item in ITEMS:
        put(root / f'{item.stem}.json', labelme(item, 'mask'))


@writer(WHOLE, masks=True)
def labelme_other_folder(root):
    put_images(root / 'pictures')
    for i, item in enumerate(ITEMS):
        path = ('..\\pictures\\', 'C:\\Users\\x\\pictures\\')[i % 2]
        put(root / 'labels_json' / f'{item.stem}.json', labelme(item, imagePath=path + item.name))


@writer(WHOLE, masks=True)
def labelme_image_data(root):
    put_images(root, ITEMS[:2])
    for item in ITEMS:
        put(root / f'{item.stem}.json', labelme(item, imageData=base64.b64encode(picture(item)).decode()))


@writer(SPLITS, masks=True)
def labelme_splits(root):
    for split, items in SPLITS.items():
        put_images(root / split, items)
        for item in items:
            put(root / split / f'{item.stem}.json', labelme(item))


def cvat_xml(items, shape, subset=lambda item: '') -> str:
    text = '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>'
    text += ''.join(f'<label><name>{name}</name></label>' for name in CLASSES) + '</labels></task></meta>'
    for i, item in enumerate(items):
        text += f'<image id="{i}" name="{item.name}" {subset(item)} width="{item.size[0]}" height="{item.size[1]}">'
        for k, polygon in item.objects:
            x, y, w, h = box_of(polygon)
            points = ';'.join(f'{a}.0,{b}.0' for a, b in np.reshape(polygon, (-1, 2)))
            fields = dict(box=f'xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"', polygon=f'points="{points}"',
                          mask=f'rle="0, {w * h}" left="{x}" top="{y}" width="{w}" height="{h}"')  # fmt: skip
            text += f'<{shape} label="{CLASSES[k]}" occluded="0" z_order="0" {fields[shape]}></{shape}>'
        text += '</image>'
    return text + '</annotations>'


@writer(WHOLE)
def cvat_boxes(root):
    put_images(root / 'images')
    put(root / 'annotations.xml', cvat_xml(ITEMS, 'box'))


@writer(WHOLE, masks=True)
def cvat_masks(root):
    put_images(root / 'images')
    put(root / 'annotations.xml', cvat_xml(ITEMS, 'mask'))


@writer(SPLITS, masks=True)
def cvat_polygons_of_subsets(root):
    names = dict(train='Train', val='Validation', test='Test')
    for split, items in SPLITS.items():
        put_images(root / 'images' / names[split], items)
    put(root / 'annotations.xml', cvat_xml(ITEMS, 'polygon', lambda item: f'subset="{names[item.split]}"'))


@writer(WHOLE)
def fiftyone_cvat(root):
    put_images(root / 'data')
    put(root / 'labels.xml', cvat_xml(ITEMS, 'box'))


def label_studio(item, shape) -> list[dict]:
    (width, height), results = item.size, []
    for k, polygon in item.objects:
        x, y, w, h = box_of(polygon)
        value = dict(x=100 * x / width, y=100 * y / height, width=100 * w / width, height=100 * h / height, rotation=0)
        if shape == 'polygon':
            value = dict(points=[[100 * a / width, 100 * b / height] for a, b in np.reshape(polygon, (-1, 2)).tolist()])
        results.append({**value, f'{shape}labels': [CLASSES[k]]})
    return results


@writer(WHOLE)
def label_studio_json(root):
    put_images(root / 'images')
    tasks = []
    for i, item in enumerate(ITEMS):
        size = dict(original_width=item.size[0], original_height=item.size[1], type='rectanglelabels')
        results = [dict(size, value=value) for value in label_studio(item, 'rectangle')]
        data = dict(image=f'/data/upload/1/{item.name.replace(" ", "%20")}')
        tasks.append(dict(id=i, data=data, annotations=[dict(id=i, result=results, was_cancelled=False)]))
    put(root / 'project.json', tasks)


@writer(WHOLE)
def label_studio_before_1(root):
    label_studio_json(root)
    path = root / 'project.json'
    path.write_text(path.read_text().replace('"annotations"', '"completions"'))


@writer(WHOLE, masks=True)
def label_studio_min(root):
    put_images(root / 'images')
    tasks = []
    for i, item in enumerate(ITEMS):
        size = dict(original_width=item.size[0], original_height=item.size[1])
        results = [value | size for value in label_studio(item, 'polygon')]
        task = dict(image=f'/data/upload/1/{item.name}', id=i, annotator=1, annotation_id=i, lead_time=3.2)
        tasks.append(task | (dict(label=results) if results else {}))
    put(root / 'project.json', tasks)


@writer(WHOLE)
def label_studio_labels(root):
    """The tags Labels and Rectangle write two results with one id for each object."""
    put_images(root / 'images')
    tasks = []
    for i, item in enumerate(ITEMS):
        results = []
        for k, value in enumerate(label_studio(item, 'rectangle')):
            labels = dict(labels=value.pop('rectanglelabels'))
            results += [dict(id=k, type='rectangle', value=value), dict(id=k, type='labels', value=value | labels)]
        tasks.append(dict(id=i, data=dict(image=f's3://bucket/{item.name}'), annotations=[dict(result=results)]))
    put(root / 'project.json', tasks)


def brush_code(mask) -> list[int]:
    """Encode a mask, shape (H, W), as Label Studio does: runs of equal RGBA values, and of other values."""
    values = np.repeat(mask.ravel() * 255, 4)
    ends = [*np.flatnonzero(np.diff(values)) + 1, len(values)]
    bits = f'{len(values):032b}{7:05b}{2:04b}{3:04b}{7:04b}{15:04b}'
    for start, end in zip([0, *ends], ends):
        alone = min(3, end - start)  # a run of other values, at most 8 (the first length of 3 bits)
        bits += f'0{0:02b}{alone - 1:03b}' + f'{values[start]:08b}' * alone
        if end - start > alone:  # a run of equal values (the last length of 16 bits)
            bits += f'1{3:02b}{end - start - alone - 1:016b}{values[start]:08b}'
    bits += '0' * (-len(bits) % 8)
    return [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]


@writer(WHOLE, masks=True)
def label_studio_brushes(root):
    put_images(root / 'images')
    tasks = []
    for i, item in enumerate(ITEMS):
        results = []
        for k, polygon in item.objects:
            mask = np.zeros(item.size[::-1], np.uint8)
            x, y, w, h = box_of(polygon)
            mask[y : y + h, x : x + w] = 1
            value = dict(format='rle', rle=brush_code(mask), brushlabels=[CLASSES[k]])
            results.append(dict(type='brushlabels', value=value, id=k))
        tasks.append(dict(id=i, data=dict(image=item.name), annotations=[dict(result=results)]))
    put(root / 'project.json', tasks)


def read(folder: Path, scratch: Path, **options):
    scratch.mkdir(exist_ok=True)
    found = Findings()
    return find_splits(folder, found, scratch, **options), found


@pytest.mark.parametrize('name', WRITERS)
def test_every_export_is_read_as_written(name, tmp_path):
    write, expected, masks, options = WRITERS[name]
    write(tmp_path / 'export')
    folder = tmp_path / 'export' / 'export.zip' if name == 'zipped' else tmp_path / 'export'
    splits, found = read(folder, tmp_path / 'scratch', **options)
    check_splits(splits, found)
    assert not found.errors
    assert {split.name for split in splits} == set(expected)
    for split in splits:
        names = {category['id']: category['name'] for category in split.coco['categories']}
        assert sorted(names.values()) == sorted(CLASSES)
        assert len(split.coco['images']) == len(expected[split.name])
        for item in expected[split.name]:
            (image,) = (i for i in split.coco['images'] if Path(i['file_name']).stem == item.stem)
            assert (split.images / image['file_name']).read_bytes() == picture(item)
            assert (image['width'], image['height']) == item.size
            objects = [a for a in split.coco['annotations'] if a['image_id'] == image['id']]
            assert [names[a['category_id']] for a in objects] == [name for name, _ in item.boxes]
            for annotation, (_, box) in zip(objects, item.boxes, strict=True):
                np.testing.assert_allclose(annotation['bbox'], box, atol=0.01)
                assert bool(annotation.get('segmentation')) == masks


def rewrite(path: str, old: str, new: str):
    """Replace text in a file of the export."""

    def change(root: Path) -> None:
        text = (root / path).read_text(encoding='utf-8')
        assert old in text
        put(root / path, text.replace(old, new, 1))

    return change


def add(path: str, content: object = ''):
    return lambda root: put(root / path, content)


def delete(path: str):
    return lambda root: (root / path).unlink()


def change_json(path: str, change):
    def write(root: Path) -> None:
        content = json.loads((root / path).read_text(encoding='utf-8'))
        change(content)
        put(root / path, content)

    return write


def resize_image(path: str):
    return lambda root: Image.new('RGB', (200, 300)).save(root / path)


def drop_first_lines(path: str):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:60])


# Faults of an export, and how each is reported: as an error or a warning (both counted), or by one line.
FAULTS = {
    'class without a name': ('ultralytics', add('labels/train/007.txt', '9 .5 .5 .1 .1'), 'errors', 'class 9 '),
    'fraction of a class': ('ultralytics', add('labels/train/007.txt', '.5 .5 .5 .1 .1'), 'errors', 'class .5'),
    'three numbers': ('ultralytics', add('labels/train/007.txt', '0 .5 .5 .1'), 'errors', '3 numbers after'),
    'seven numbers': ('ultralytics', add('labels/train/007.txt', '0 1 1 1 1 1 1 1'), 'errors', '7 numbers'),
    'a word': ('ultralytics', add('labels/train/007.txt', '\n0 .5 zero 1 1'), 'errors', 'line 2: '),
    'keypoints of another shape': ('ultralytics_pose', add('labels/train/007.txt', '0 ' + '.5 ' * 10), 'errors', '12'),
    'names in a yaml twice': ('ultralytics', rewrite('data.yaml', '2: apfel', '1: apfel'), 'line', 'twice'),
    'one name of two classes': ('ultralytics', rewrite('data.yaml', 'apfel', 'zebra'), 'line', "'zebra'"),
    'gap of used classes': ('ultralytics', rewrite('data.yaml', '2: apfel', '5: apfel'), 'errors', 'class 2 '),
    'nc': ('ultralytics', rewrite('data.yaml', 'nc: 3', 'nc: 4'), 'line', 'nc is'),
    'split folder missing': ('ultralytics', rewrite('data.yaml', 'images/val', 'images/v'), 'line', 'images/v '),
    'test folder missing': ('ultralytics', rewrite('data.yaml', 'images/test', 'nowhere'), 'warnings', 'nowhere'),
    'list entry without image': ('yolo_lists', rewrite('train.txt', '007', '700'), 'errors', 'train/700.png'),
    'list entry in another split': ('yolo_lists', rewrite('val.txt', '0_1', '007'), 'errors', 'val/007.png'),
    'list entry twice': ('yolo_lists', rewrite('val.txt', 'x.png', '0_1.png'), 'warnings', '1 of them'),
    'image in no list': ('cvat_yolo_1_1', add('obj_train_data/more.png', picture(ITEMS[0])), 'warnings', 'more.png'),
    'two class files': ('labelimg', add('more/classes.txt', 'a\nb\n'), 'line', 'more/classes.txt'),
    'class file beside yaml': ('ultralytics', add('classes.txt', 'a\nb\n'), 'warnings', 'class files that differ'),
    'label without image': ('labelimg', add('photo 2.txt', '0 .5 .5 .1 .1'), 'warnings', 'photo 2.txt'),
    'image of another kind': ('labelimg', add('more.heic', b'heic'), 'warnings', '.heic'),
    'image without labels': ('labelimg', delete('007.txt'), 'warnings', '007.png'),
    'image outside of splits': ('own_split', add('images/a.png', picture(ITEMS[3])), 'warnings', 'a.png'),
    'labels that differ': ('label_studio_yolo', add('images/007.txt', '0 .5 .5 .1 .1'), 'errors', 'labels/007.txt'),
    'two images of one name': ('labelimg', add('007.jpg', picture(ITEMS[3])), 'errors', '007.jpg'),
    'binary labels': ('labelimg', add('007.txt', b'\xff\xfe\xfa'), 'errors', '007.txt'),
    'yaml of something else': ('labelimg', add('compose.yaml', 'a: 1\na: 2'), 'notes', 'compose.yaml'),
    'split in a yaml without a value': ('ultralytics', rewrite('data.yaml', 'test: images/test', 'test:'), 'warnings',
                                        'images/test/z.png'),
    'hidden folder': ('labelimg', add('.ipynb_checkpoints/007.txt', '9'), 'notes', '.ipynb_checkpoints'),
    'damaged image': ('labelimg', drop_first_lines('007.png'), 'errors', '007.png'),
    'VOC: list entry without image': ('voc_lists', rewrite('ImageSets/Main/val.txt', 'x 1', 'xx 1'), 'errors', 'xx 1'),
    'VOC: image in no list': ('voc_lists', rewrite('ImageSets/Main/test.txt', 'z 1', ''), 'warnings', 'z.png'),
    'VOC: image without XML': ('voc_from_zero', delete('007.xml'), 'warnings', '007.png'),
    'VOC: XML without image': ('voc_from_zero', delete('007.png'), 'warnings', '007.xml'),
    'VOC: damaged XML': ('voc_from_zero', drop_first_lines('007.xml'), 'errors', '007.xml'),
    'VOC: no number': ('voc_from_zero', rewrite('007.xml', '<xmin>', '<xmin>a'), 'errors', 'xmin'),
    'VOC: no box': ('voc_from_zero', rewrite('007.xml', 'bndbox', 'robndbox'), 'errors', '007.xml'),
    'VOC: two boxes': ('voc_from_zero', rewrite('007.xml', '<bndbox>', '<bndbox/><bndbox>'), 'errors', '2 <bndbox>'),
    'VOC: field of the file': ('voc_from_zero', rewrite('007.xml', '<size>', '<weather>rain</weather><size>'), 'notes',
                               '"weather"'),
    'VOC: other size': ('voc_from_zero', resize_image('007.png'), 'errors', '007.png'),
    'VOC: another filename': ('voc_from_zero', rewrite('007.xml', '007.png', '0_1.png'), 'errors', '0_1.png'),
    'VOC: truncated': ('voc_from_zero', rewrite('007.xml', '<difficult>0', '<truncated>1</truncated><difficult>0'),
                       'notes', '"truncated"'),
    'VOC: mask of segments': ('voc_masks_of_segments', lambda root: None, 'notes', 'SegmentationClass/'),
    'VOC: filename of no image': ('voc_from_zero', rewrite('007.xml', '007.png', 'IMG_1.jpg'), 'notes', 'IMG_1.jpg'),
    'VOC: polygon': ('voc_from_zero', rewrite('007.xml', '<difficult>', '<polygon><x1>3</x1></polygon><difficult>'),
                     'notes', '"polygon"'),
    'VOC: two images of one name': ('fiftyone_voc', add('data/y.jpg', picture(ITEMS[6])), 'warnings', 'y.jpg'),
    'LabelMe: other size': ('labelme_polygons', resize_image('007.png'), 'errors', '007.png'),
    'LabelMe: another image': ('labelme_polygons', rewrite('007.json', '007.png', '0_1.png'), 'errors', '0_1.png'),
    'LabelMe: lines': ('labelme_polygons', rewrite('007.json', '"polygon"', '"linestrip"'), 'warnings', 'linestrip'),
    'LabelMe: flags of the file': ('labelme_polygons', change_json('007.json', lambda content: content.update(
        flags=dict(dark=True, wet=False))), 'notes', '"flags"'),
    'LabelMe: description': ('labelme_polygons', rewrite('007.json', '"label"', '"description": "old", "label"'),
                             'notes', '"description"'),
    'LabelMe: path of no image': ('labelme_polygons', rewrite('007.json', '007.png', 'IMG_1.jpg'), 'notes', 'IMG_1'),
    'LabelMe: points': ('labelme_polygons', rewrite('007.json', '"polygon"', '"points"'), 'warnings', 'type points'),
    'LabelMe: two points': ('labelme_rectangles', rewrite('x.json', '[]', '[{"label": "apfel", "points": [[1, 2]]}]'),
                            'errors', 'x.json'),
    'LabelMe: image missing': ('labelme_other_folder', delete('pictures/007.png'), 'warnings', '007.json'),
    'CVAT: image missing': ('cvat_boxes', delete('images/007.png'), 'errors', '007.png'),
    'CVAT: polyline': ('cvat_boxes', rewrite('annotations.xml', '<box', '<polyline/><box'), 'warnings', 'polyline'),
    'CVAT: no number': ('cvat_boxes', rewrite('annotations.xml', 'xtl="', 'xtl="a'), 'errors', 'xtl'),
    'CVAT: attribute': ('cvat_boxes', rewrite('annotations.xml', '></box>', '><attribute name="a">b</attribute></box>'),
                        'notes', '"attribute"'),
    'CVAT: occluded': ('cvat_boxes', rewrite('annotations.xml', 'occluded="0"', 'occluded="1"'), 'notes', '"occluded"'),
    'CVAT: tag': ('cvat_boxes', rewrite('annotations.xml', '<box', '<tag label="x"/><box'), 'warnings', 'labels of im'),
    'CVAT: short mask': ('cvat_masks', rewrite('annotations.xml', 'rle="0, ', 'rle="1, '), 'errors', 'runs'),
    'CVAT: other size': ('cvat_boxes', resize_image('images/007.png'), 'errors', '007.png'),
    'CVAT: video': ('cvat_boxes', rewrite('annotations.xml', '<image', '<track/><image'), 'line', 'images 1.1'),
    'COCO: image missing': ('cvat_coco', delete('images/default/007.png'), 'errors', '007.png'),
    'COCO: image of another subset': ('cvat_coco_subsets', delete('images/batch1/0_1.png'), 'errors', '0_1.png'),
    'COCO: two files of one image': ('fiftyone_coco', add('more.json', coco(ITEMS[:1])), 'errors', 'photo 1.png'),
    'COCO: file beside splits': ('cvat_coco_splits', add('annotations/instances_more.json', coco(ITEMS[:1])),
                                 'warnings', 'instances_more.json'),
    'COCO: attributes': ('fiftyone_coco', change_json('labels.json', lambda content: content['annotations'][0].update(
        attributes=dict(occluded=True))), 'notes', '"attributes"'),
    'COCO: field of an image': ('fiftyone_coco', change_json('labels.json', lambda content: content['images'][0].update(
        neg_category_ids=[1])), 'notes', '"neg_category_ids"'),
    'COCO: captions': ('coco_2017', add('annotations/captions_train2017.json', '{}'), 'warnings', 'captions'),
    'COCO: image nowhere named': ('fiftyone_coco', add('data/more.png', picture(ITEMS[0])), 'warnings', 'more.png'),
    'Label Studio: image missing': ('label_studio_json', delete('images/007.png'), 'errors', '007.png'),
    'Label Studio: keypoints': ('label_studio_min', rewrite('project.json', 'polygonlabels', 'keypointlabels'),
                                'warnings', 'other than rectangles'),
    'Label Studio: predictions': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0].update(
        predictions=[dict(result=[dict(id='p')])])), 'notes', '"predictions"'),
    'Label Studio: choices': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0]['annotations'][0][
        'result'].append(dict(type='choices', id='c', value=dict(choices=['a'])))), 'warnings', 'choices'),
    'Label Studio: text of an object': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0][
        'annotations'][0]['result'][0].update(meta=dict(text=['blurred']))), 'notes', '"meta"'),
    'Label Studio: two labels': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0]['annotations'][
        0]['result'][0]['value']['rectanglelabels'].append('apfel')), 'errors', '2 labels instead of one'),
    'Label Studio: two images': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0]['data'].update(
        right='/data/upload/1/x.png')), 'errors', 'several images'),
    'Label Studio: short brush': ('label_studio_brushes', change_json('project.json', lambda tasks: tasks[0][
        'annotations'][0]['result'][0]['value']['rle'].pop()), 'errors', 'unreadable results'),
    'Label Studio: brush of another size': ('label_studio_brushes', lambda root: Image.new('RGB', (9, 9)).save(
        root / 'images/007.png'), 'errors', 'instead of 4 x 9 x 9'),
    'Label Studio: no annotation': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0].update(
        annotations=[])), 'warnings', 'photo 1.png'),
    'line twice': ('labelimg', add('photo 1.txt', '0 .5 .5 .1 .1\n' * 2), 'warnings', 'line 2'),
    'COCO: two images of the stated name': ('fiftyone_coco', add('data/old/007.png', b''), 'errors', '007.png'),
    'Label Studio: two annotations': ('label_studio_json', change_json('project.json', lambda tasks: tasks[0].update(
        annotations=tasks[0]['annotations'] * 2)), 'warnings', 'photo 1.png'),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'change', 'level', 'says'), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_reported_and_counted(name, change, level, says, tmp_path):
    write, _, _, options = WRITERS[name]
    write(tmp_path / 'export')
    change(tmp_path / 'export')
    if level == 'line':
        with pytest.raises(InputError, match=re.escape(says)):
            read(tmp_path / 'export', tmp_path / 'scratch', **options)
        return
    splits, found = read(tmp_path / 'export', tmp_path / 'scratch', **options)
    check_splits(splits, found)
    told = getattr(found, level)
    assert [kind for kind, places in told.items() if says in kind or any(says in str(place) for place in places)]
    assert bool(found.errors) == (level == 'errors')


DROPPED = {
    'class without a name': ('ultralytics', add('labels/train/007.txt', '9 .5 .5 .1 .1'), {'007'}),
    'labels that differ': ('label_studio_yolo', add('images/007.txt', '0 .5 .5 .1 .1'), {'007'}),
    'two images of one name': ('labelimg', add('007.jpg', picture(ITEMS[3])), {'007'}),
    'damaged image': ('labelimg', drop_first_lines('007.png'), {'007'}),
    'VOC: no box': ('voc_from_zero', rewrite('007.xml', 'bndbox', 'robndbox'), {'007'}),
    'VOC: another filename': ('voc_from_zero', rewrite('007.xml', '007.png', '0_1.png'), {'007'}),
    'LabelMe: another image': ('labelme_polygons', rewrite('007.json', '007.png', '0_1.png'), {'007', '0_1'}),
    'LabelMe: damaged': ('labelme_polygons', rewrite('007.json', '"shapes": [', '"shapes": [[}'), {'007'}),
    'CVAT: no number': ('cvat_boxes', rewrite('annotations.xml', 'xtl="', 'xtl="a'), {'photo 1'}),
    'COCO: two files of one image': ('fiftyone_coco', add('more.json', coco(ITEMS[:1])), {'photo 1'}),
    'COCO: no box': ('fiftyone_coco', change_json('labels.json', lambda content: content['annotations'][0].pop('bbox')),
                     {'photo 1'}),
    'Label Studio: no number': ('label_studio_json', rewrite('project.json', '"x": ', '"y": '), {'photo 1'}),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'change', 'gone'), DROPPED.values(), ids=DROPPED)
def test_an_image_with_a_fault_is_dropped_with_all_of_its_objects(name, change, gone, tmp_path):
    """The remaining objects are unchanged: no object becomes background."""
    write, expected, _, options = WRITERS[name]
    write(tmp_path / 'export')
    change(tmp_path / 'export')
    splits, found = read(tmp_path / 'export', tmp_path / 'scratch', **options)
    check_splits(splits, found)
    assert found.errors
    for split in drop_faulty(splits, found):
        left = {Path(image['file_name']).stem: image['id'] for image in split.coco['images']}
        assert set(left) == {item.stem for item in expected[split.name]} - gone
        for item in expected[split.name]:
            boxes = [a['bbox'] for a in split.coco['annotations'] if a['image_id'] == left.get(item.stem)]
            wanted = [box for _, box in item.boxes] if item.stem in left else []
            np.testing.assert_allclose(np.reshape(boxes, (-1, 4)), np.reshape(wanted, (-1, 4)), atol=0.01)


TOOLS = {
    'VIA': ('via.json', '{"a.png1": {"filename": "a.png", "regions": [{"shape_attributes": {"name": "rect"}}]}}'),
    'Supervisely': ('ds/ann/a.png.json', '{"size": {}, "objects": [{"classTitle": "x", "points": {}}]}'),
    'Darwin': ('a.json', '{"item": {"name": "a.png", "slots": []}, "annotations": [{"bounding_box": {}}]}'),
    'Datumaro': ('annotations/train.json', '{"media_type": 2, "infos": {}, "categories": {"label": {}}, "items": []}'),
    'Labelbox': ('a.ndjson', '{"data_row": {"id": "1"}, "projects": {}}'),
    'FiftyOne': ('samples.json', '{"samples": [{"filepath": "a.png", "truth": {"_cls": "Detections"}}]}'),
    'CreateML': ('a.json', '[{"image": "a.png", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}]'),
    'CVAT backup': ('annotations.json', '[{"version": 0, "tags": [], "shapes": [], "tracks": []}]'),
    'ISAT': ('a.json', '{"info": {"description": "ISAT", "name": "a.png"}, "objects": []}'),
    'VoTT': ('a-asset.json', '{"asset": {"name": "a.png"}, "regions": [{"tags": ["x"]}]}'),
    'SuperAnnotate': ('a.png.json', '{"metadata": {}, "instances": [{"type": "bbox", "className": "x"}]}'),
    'detections': ('results.json', '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'),
    'Ultralytics HUB': ('data.ndjson', '{"type": "dataset", "task": "detect", "class_names": {"0": "x"}}'),
    'Hugging Face': ('metadata.jsonl', '{"file_name": "a.png", "objects": {"bbox": []}}'),
    'SageMaker': ('output.manifest', '{"source-ref": "s3://a/a.png"}'),
    'CSV ': ('labels.csv', 'x,1,2,3,4,a.png,5,6\n'),
    'TFRecord': ('train/a.tfrecord', 'x'),
    'Parquet': ('data/train-0.parquet', 'PAR1'),
    'Roboflow': ('README.roboflow.txt', 'exported via roboflow.com'),
    'CSV of TensorFlow': ('_annotations.csv', 'filename,width,height,class,xmin,ymin,xmax,ymax\n'),
    'masks of segments': ('labelmap.txt', '# label:color_rgb:parts:actions\nx:1,2,3::\n'),
    'Open Images': ('bbox.csv', 'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n'),
}


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_that_are_not_supported_are_named(tool, tmp_path):
    put_images(tmp_path / 'export' / 'images', ITEMS[:1])
    put(tmp_path / 'export' / TOOLS[tool][0], TOOLS[tool][1])
    with pytest.raises(InputError, match=tool) as error:
        read(tmp_path / 'export', tmp_path / 'scratch')
    assert all(name in str(error.value) for name in READERS)
    assert ('datum convert' in str(error.value)) == (tool in ('Datumaro', 'Open Images', 'masks of segments'))


def test_a_folder_without_labels_is_told_what_is_supported(tmp_path):
    put_images(tmp_path / 'export' / 'images')
    with pytest.raises(InputError, match='Supported formats: COCO.*LabelMe'):
        read(tmp_path / 'export', tmp_path / 'scratch')
    labels = tmp_path / 'export' / 'labels' / 'x.txt'
    put(labels, '0 .5 .5 .1 .1')
    with pytest.raises(InputError, match='x.txt .*classes.txt'):
        read(tmp_path / 'export', tmp_path / 'scratch')
    put(labels, 'Car 0.00 0 1.5 1 2 3 4')  # KITTI
    with pytest.raises(InputError, match='a known format. Supported'):
        read(tmp_path / 'export', tmp_path / 'scratch')
    put(tmp_path / 'export' / 'train.tar.gz', 'x')
    with pytest.raises(InputError, match='Unpack train.tar.gz'):
        read(tmp_path / 'export', tmp_path / 'scratch')


def test_circles_and_rotated_boxes(tmp_path):
    """A circle touches its box, and a box rotated by 90 degrees about its centre is as wide as it was high."""
    put_images(tmp_path / 'circle', ITEMS[:1])
    shape = dict(label='apfel', points=[[30, 40], [30, 50]], shape_type='circle')
    put(tmp_path / 'circle' / 'a.json', labelme(ITEMS[0], shapes=[shape]))
    ((split,), _) = read(tmp_path / 'circle', tmp_path / 'scratch')
    (annotation,) = split.coco['annotations']
    np.testing.assert_allclose(annotation['bbox'], [20, 30, 20, 20], atol=0.01)
    assert annotation['area'] == pytest.approx(np.pi * 100, rel=0.01)

    put_images(tmp_path / 'cvat' / 'images', ITEMS[:1])
    item = Item(ITEMS[0].name, ITEMS[0].size, 'train', [(0, [10, 20, 50, 20, 50, 30, 10, 30])])
    text = cvat_xml([item], 'box').replace('occluded="0"', 'rotation="90"')
    put(tmp_path / 'cvat' / 'annotations.xml', text)
    ((split,), _) = read(tmp_path / 'cvat', tmp_path / 'scratch')
    np.testing.assert_allclose(split.coco['annotations'][0]['bbox'], [25, 5, 10, 40], atol=0.01)


def test_images_are_rotated_by_their_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ('a.jpg', 'b.png'):
        put(tmp_path / 'export' / f'{name[0]}.txt', '0 0.5 0.5 1 0.5')
        Image.new('RGB', (80, 40)).save(tmp_path / 'export' / name, exif=exif)
    put(tmp_path / 'export' / 'classes.txt', 'thing\n')
    ((split,), found) = read(tmp_path / 'export', tmp_path / 'scratch')
    assert [(image['width'], image['height']) for image in split.coco['images']] == [(40, 80)] * 2
    assert [annotation['bbox'] for annotation in split.coco['annotations']] == [[0, 20, 40, 40]] * 2
    check_splits([split], found)
    assert not found.errors  # as decoding returns them


@pytest.mark.parametrize('seed', range(5))
def test_every_class_is_in_both_splits_if_possible(seed):
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
        # Image 7 has the only object of class 101, and stays with all its objects.
        if len(holders - {7}) > 1:
            assert holders & chosen, f'{category} is not in validation'
