"""Data sets in other formats than COCO's, as a COCO dict: YOLO's text, Pascal VOC's XML and LabelMe's JSON.

Read here and not by a library: labelformat 0.1.17 passes over images without labels and lines that it cannot read, with
a message in the log, and takes the size of an image before its EXIF orientation; globox 2.9 reads boxes alone;
datumaro 1.13 brings another OpenCV and Pillow. What is read here, ``spec-mmdet prepare`` checks like any other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import yaml
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from .images import IMAGE_SUFFIXES

SPLITS = dict(train=('train', 'training'), val=('val', 'valid', 'validation'))
WHOLE = 'all'  # the one split of a data set that is still to be split


class Builder:
    """A COCO dict that grows image by image; ids are 1, 2, 3, ..., and classes in the order of ``classes``.

    Args:
        folder: what file names are relative to.
        classes: the names; where they are not known, they are those of the objects, sorted.
    """

    def __init__(self, folder: Path, classes: list[str] | None = None) -> None:
        self.folder = folder
        self.classes = classes
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add_image(self, path: Path) -> tuple[int, int]:
        """Add an image; returns its width and height in pixels, turned by its EXIF orientation as training turns it."""
        try:
            with Image.open(path) as image:
                width, height = ImageOps.exif_transpose(image).size
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise InputError(f'{path}: cannot be read as an image') from error
        name = path.relative_to(self.folder).as_posix()
        self.images.append(dict(id=len(self.images) + 1, file_name=name, width=width, height=height))
        return width, height

    def add_object(self, name: str, box: list[float], polygons: list[list[float]] = (), crowd: bool = False) -> None:
        """Add an object of the last image. box: [x, y, width, height]; polygons: [x, y, x, y, ...]; all in pixels."""
        self.annotations.append(
            dict(
                id=len(self.annotations) + 1,
                image_id=len(self.images),
                category_id=name,
                bbox=[round(value, 3) for value in box],
                area=box[2] * box[3] if not polygons else sum(map(area, polygons)),
                iscrowd=int(crowd),
                **(dict(segmentation=[[round(v, 3) for v in polygon] for polygon in polygons]) if polygons else {}),
            )
        )

    def coco(self) -> dict:
        """The finished dict."""
        classes = self.classes or sorted({annotation['category_id'] for annotation in self.annotations})
        ids = {name: i for i, name in enumerate(classes, start=1)}
        for annotation in self.annotations:
            annotation['category_id'] = ids[annotation['category_id']]
        categories = [dict(id=i, name=name, supercategory='') for name, i in ids.items()]
        return dict(info={}, licenses=[], images=self.images, annotations=self.annotations, categories=categories)


def area(polygon: list[float]) -> float:
    """Of a polygon [x, y, x, y, ...], by the shoelace formula."""
    xs, ys = polygon[::2], polygon[1::2]
    return abs(sum(x * y1 - x1 * y for x, y, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1]))) / 2


def box_around(polygon: list[float]) -> list[float]:
    xs, ys = polygon[::2], polygon[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def images_in(folder: Path) -> list[Path]:
    """The images in a folder and those below it, sorted; hidden files, as archives of macOS have them, are none."""
    return sorted(
        path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith('.')
    )


def number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f'{where}: {text!r:.40} is no number') from error


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8-sig')
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f'{path}: cannot be read as text in UTF-8') from error


# YOLO


def read_yolo(folder: Path) -> dict[str, tuple[dict, Path]] | None:
    """YOLO's text files, of which a line is a box (class, then centre, width and height) or a polygon (class, then
    points), all as fractions of the image; an image without a file has no objects.

    The classes are in data.yaml or classes.txt; the images are where data.yaml says, or in images/ beside labels/.
    """
    configs = sorted(path for path in (*folder.glob('*.yaml'), *folder.glob('*.yml')) if 'names' in yaml_of(path))
    if configs:
        config = yaml_of(configs[0])
        names = config['names']
        classes = [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else list(map(str, names))
        places = {split: yolo_images(folder, config, split) for split in SPLITS}
    elif (folder / 'classes.txt').is_file():
        classes = [line.strip() for line in text_of(folder / 'classes.txt').splitlines() if line.strip()]
        places = {}
    else:
        return None
    places = {split: place for split, place in places.items() if place}
    if not places:
        places = {WHOLE: folder / 'images' if (folder / 'images').is_dir() else folder}
    read = {}
    for split, place in places.items():
        builder = Builder(place, classes)
        for path in images_in(place):
            add_yolo(builder, path, labels_of(path, place))
        read[split] = builder.coco(), place
    return read


def yaml_of(path: Path) -> dict:
    try:
        content = yaml.safe_load(text_of(path))
    except yaml.YAMLError as error:
        raise InputError(f'{path}: not YAML ({" ".join(str(error).split())})') from error
    return content if isinstance(content, dict) else {}


def yolo_images(folder: Path, config: dict, split: str) -> Path | None:
    """The image folder of a split that data.yaml names: below its ``path``, or beside it as Roboflow has it."""
    named = next((config[name] for name in SPLITS[split] if config.get(name)), None)
    if named is None:
        return None
    if not isinstance(named, str) or named.endswith('.txt'):
        raise InputError(f'{folder}: its data.yaml has {named!r:.60} for {split}; a folder of images is read')
    for root in (folder / str(config.get('path') or ''), folder):
        for name in (named, named.removeprefix('../'), named.removeprefix('./')):
            if (root / name).is_dir():
                return (root / name).resolve()
    raise InputError(f'{folder}: lacks the folder {named} that its data.yaml names for {split}')


def labels_of(image: Path, folder: Path) -> Path:
    """The label file of an image: in labels/ in the place of the last images/ of its path, or beside the image."""
    parts = list(image.parts)
    if 'images' in parts:
        parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
        return Path(*parts).with_suffix('.txt')
    beside = folder / 'labels' / image.relative_to(folder).with_suffix('.txt')
    return beside if beside.is_file() else image.with_suffix('.txt')


def add_yolo(builder: Builder, image: Path, labels: Path) -> None:
    width, height = builder.add_image(image)
    for i, line in enumerate(text_of(labels).splitlines() if labels.is_file() else (), start=1):
        where = f'{labels}, line {i}'
        fields = line.split()
        if not fields:
            continue
        index, *values = (number(field, where) for field in fields)
        if index not in range(len(builder.classes)):
            raise InputError(f'{where}: class {fields[0]}, of {len(builder.classes)} classes numbered from 0')
        name = builder.classes[int(index)]
        if len(values) == 4:
            x, y, w, h = values
            builder.add_object(name, [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height])
        elif len(values) >= 6 and len(values) % 2 == 0:
            polygon = [value * (height if k % 2 else width) for k, value in enumerate(values)]
            builder.add_object(name, box_around(polygon), [polygon])
        else:
            raise InputError(
                f'{where}: {len(values)} numbers after the class; a box has 4, a polygon 6 or more, in pairs'
            )


# Pascal VOC


def read_voc(folder: Path) -> dict[str, tuple[dict, Path]] | None:
    """Pascal VOC's XML, a file an image: boxes alone. Objects that are marked difficult become crowds: neither learnt
    from nor counted.

    In VOC's own layout (Annotations/, JPEGImages/, ImageSets/Main/train.txt and val.txt) or beside the images, as
    Roboflow and labelImg write them.
    """
    return read_by_file(folder, '.xml', add_voc, {'Annotations', 'annotations'}, ('JPEGImages', 'images'))


def add_voc(builder: Builder, image: Path, labels: Path) -> None:
    builder.add_image(image)
    try:
        root = ElementTree.fromstring(text_of(labels).encode())
    except ElementTree.ParseError as error:
        raise InputError(f'{labels}: not XML ({error})') from error
    for thing in root.iter('object'):
        name, box = thing.findtext('name'), thing.find('bndbox')
        if not name or box is None:
            raise InputError(f'{labels}: an object without name or bndbox')
        x0, y0, x1, y1 = (number(box.findtext(key) or '', str(labels)) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
        builder.add_object(name, [x0, y0, x1 - x0, y1 - y0], crowd=thing.findtext('difficult') == '1')


# LabelMe


def read_labelme(folder: Path) -> dict[str, tuple[dict, Path]] | None:
    """LabelMe's JSON, a file beside each image: polygons and rectangles; shapes of one group_id and label are one
    object of several polygons."""
    return read_by_file(folder, '.json', add_labelme, set(), ())


def add_labelme(builder: Builder, image: Path, labels: Path) -> None:
    builder.add_image(image)
    try:
        shapes = json.loads(text_of(labels))['shapes']
        found: dict[object, list[tuple[str, list[float]]]] = {}
        for i, shape in enumerate(shapes):
            points, kind, name = shape['points'], shape.get('shape_type') or 'polygon', shape['label']
            if kind == 'rectangle':
                (x0, y0), (x1, y1) = points
                points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
            elif kind != 'polygon':
                raise InputError(f'{labels}: a shape of type {kind!r:.20}; polygons and rectangles are read')
            group = (name, shape['group_id']) if shape.get('group_id') is not None else i
            found.setdefault(group, []).append((kind, name, [float(v) for point in points for v in point]))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{labels}: not in LabelMe's format ({type(error).__name__}: {error})") from error
    for parts in found.values():
        everything = [value for _, _, polygon in parts for value in polygon]
        with_masks = any(kind == 'polygon' for kind, _, _ in parts)
        builder.add_object(parts[0][1], box_around(everything), [p for _, _, p in parts] if with_masks else [])


# All


def read_by_file(
    folder: Path, suffix: str, add: Callable, label_folders: set[str], image_folders: tuple[str, ...]
) -> dict[str, tuple[dict, Path]] | None:
    """A format with a label file for each image that has one; None where there is none of its files."""
    splits = {split: folder / name for split, names in SPLITS.items() for name in names if (folder / name).is_dir()}
    read = {}
    for split, place in (splits or {WHOLE: folder}).items():
        files = label_files(place, suffix, label_folders)
        if files:
            images = next((place / name for name in image_folders if (place / name).is_dir()), place)
            builder = Builder(images)
            by_stem = {path.relative_to(images).with_suffix('').as_posix(): path for path in images_in(images)}
            unlabelled = sorted(set(by_stem) - set(files))
            if unlabelled:
                print(f'{len(unlabelled)} images of {images} have no {suffix} file and are left out, first '
                      f'{by_stem[unlabelled[0]].name}')  # fmt: skip
            for stem, path in files.items():
                if stem not in by_stem:
                    raise InputError(f'{path}: there is no image {stem} in {images}')
                add(builder, by_stem[stem], path)
            read[split] = builder.coco(), images
    return with_same_classes(by_image_sets(folder, read)) if read else None


def label_files(place: Path, suffix: str, label_folders: set[str]) -> dict[str, Path]:
    """The label files of a split by the path of their image without its suffix."""
    root = next((place / name for name in sorted(label_folders) if (place / name).is_dir()), place)
    found = {path.relative_to(root).with_suffix('').as_posix(): path for path in sorted(root.rglob(f'*{suffix}'))}
    if suffix == '.json':  # LabelMe's, of which other formats have some, too
        found = {stem: path for stem, path in found.items() if '"shapes"' in text_of(path)}
    return found


def by_image_sets(folder: Path, read: dict[str, tuple[dict, Path]]) -> dict[str, tuple[dict, Path]]:
    """A whole split as VOC's ImageSets/Main divides it, where it does."""
    lists = {split: folder / 'ImageSets' / 'Main' / f'{split}.txt' for split in SPLITS}
    if WHOLE not in read or not all(path.is_file() for path in lists.values()):
        return read
    coco, images = read[WHOLE]
    parts = {}
    for split, path in lists.items():
        stems = {line.split()[0] for line in text_of(path).splitlines() if line.strip()}
        chosen = [image for image in coco['images'] if Path(image['file_name']).stem in stems]
        ids = {image['id'] for image in chosen}
        annotations = [dict(annotation) for annotation in coco['annotations'] if annotation['image_id'] in ids]
        parts[split] = {**coco, 'images': chosen, 'annotations': annotations}, images
    return parts


def with_same_classes(read: dict[str, tuple[dict, Path]]) -> dict[str, tuple[dict, Path]]:
    """The splits with the classes of all of them, sorted: each by itself knows those of its own objects alone."""
    names = sorted({category['name'] for coco, _ in read.values() for category in coco['categories']})
    ids = {name: i for i, name in enumerate(names, start=1)}
    for coco, _ in read.values():
        old = {category['id']: category['name'] for category in coco['categories']}
        for annotation in coco['annotations']:
            annotation['category_id'] = ids[old[annotation['category_id']]]
        coco['categories'] = [dict(id=i, name=name, supercategory='') for name, i in ids.items()]
    return read


def read_folder(folder: Path) -> tuple[str, dict[str, tuple[dict, Path]]] | None:
    """A data set in one of these formats.

    Args:
        folder: where it lies, labels and images.

    Returns:
        The format's name, and for each split ('train' and 'val', or 'all') a COCO dict and the folder of its images;
        None where it is in none of them.

    Raises:
        InputError: at the first file that cannot be read, with its name.
    """
    for name, read in formats():
        if found := read(folder):
            return name, found
    return None


def formats() -> Iterator[tuple[str, Callable]]:
    yield 'YOLO', read_yolo
    yield 'Pascal VOC', read_voc
    yield 'LabelMe', read_labelme
