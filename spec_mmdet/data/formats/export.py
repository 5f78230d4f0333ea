"""List the files of an exported folder, record which are used, and build COCO dicts from them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from ...errors import InputError
from ..findings import Findings, Place
from ..images import DAMAGED, EXIF_ORIENTATION, IMAGE_SUFFIXES, allow_large_images
from ..rules import compute_polygon_area, rasterise
from ..splits import WHOLE, Split

SPLITS = dict(train=('train', 'training'), val=('val', 'valid', 'validation'), test=('test', 'testing'))
JUNK = {'__macosx', '@eadir', 'thumbs.db', 'desktop.ini'}
MISSING = 'missing images'
LABELS = {'.txt', '.xml', '.json', '.jsonl', '.ndjson', '.csv'}
OTHER_IMAGES = {'.heic', '.heif', '.avif', '.gif', '.svg', '.dng', '.cr2', '.nef', '.arw', '.psd', '.jxl', '.tga'}
# Words in names of folders that separate labels from images; ignored when paths of both are compared.
NEUTRAL = set('images labels annotations jpegimages data img imgs image ann json jsons xml xmls txt'.split())  # noqa: SIM905
# Words beside the split in names of folders and files.
BESIDE_SPLIT = NEUTRAL | set('label annotation instances coco yolo voc dataset set list split obj autosplit'.split())  # noqa: SIM905


def list_words(name: str) -> list[str]:
    """Return the words of a name in lower case, without numbers at its end."""
    return [word for word in re.split(r'[ _.-]+', name.lower().rstrip('0123456789')) if word]


def parse_split(name: str) -> str | None:
    """Return the split of a folder, list or subset from its name, like 'train2017', 'Valid' or 'test_images'."""
    words = [word for word in list_words(name) if word not in BESIDE_SPLIT]
    return next((split for split, known in SPLITS.items() if len(words) == 1 and words[0] in known), None)


def find_split_words(name: str) -> set[str]:
    """Return the splits that the words of a name contain, for instance {'train'} for 'lvis_v1_train'."""
    return {split for split, known in SPLITS.items() if not {*known}.isdisjoint(list_words(name))}


def strip_neutral(name: str) -> str:
    """Return a folder's name without words such as 'images' and 'labels'."""
    words = re.split('[ _.-]+', name)
    kept = [word for word in words if word.lower() not in NEUTRAL]
    return '_'.join(kept) if len(kept) < len(words) else name


def is_set(value: object) -> bool:
    """Return whether a field of a label file contains information."""
    if isinstance(value, dict | list):
        return any(map(is_set, value.values() if isinstance(value, dict) else value))
    return value not in (None, False, 0) and str(value).strip().lower() not in ('', '0', 'false', 'unspecified')


def list_spellings(name: str) -> Iterator[str]:
    """Yield an image's path as written, then without URL escapes and queries."""
    name = name.replace('\\', '/')
    yield from dict.fromkeys([name, unquote(name), unquote(name.partition('?d=')[2] or name.partition('?')[0])])


def split_path(name: str) -> tuple[str, ...]:
    """Return the components of a path in Unicode form NFC, without '.', '..' and drives."""
    parts = unicodedata.normalize('NFC', name).split('/')
    return tuple(part for part in parts if part not in ('', '.', '..') and not part.endswith(':'))


def is_junk(name: str) -> bool:
    return name.startswith('.') or name.lower() in JUNK


def read_size(path: Path) -> tuple[int, int]:
    """Read an image's width and height from its header, after applying its EXIF orientation."""
    with allow_large_images(), Image.open(path) as image:
        # The base class's method, because that of PNG decodes the image.
        turned = Image.Image.getexif(image).get(EXIF_ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: if it cannot.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f'{path}: not UTF-8. Save it in this encoding') from error


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


class Export:
    """The files of an exported folder, without hidden ones, and which of them are used.

    Args:
        folder: the folder.
        found: receives faults and unused files.
        scratch: a temporary folder for images that label files contain.
        zero_based: whether Pascal VOC's coordinates start at 0 instead of 1.
    """

    def __init__(self, folder: Path, found: Findings, scratch: Path, zero_based: bool = False) -> None:
        self.folder, self.scratch = Path(os.path.abspath(folder)), Path(os.path.abspath(scratch))
        self.found, self.zero_based = found, zero_based
        self.used: set[Path] = set()
        self.unclear: set[Path] = set()  # images with several possible label files
        self.files: list[Path] = []
        self.hidden: list[Path] = []
        for root, folders, names in os.walk(self.folder, followlinks=True):
            hidden = [Path(root, name) for name in (*folders, *names) if is_junk(name)]
            self.hidden += [path for path in hidden if path != self.scratch]
            folders[:] = sorted(name for name in folders if not is_junk(name))
            self.files += [Path(root, name) for name in sorted(names) if not is_junk(name)]
        self.images = [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]
        self.folders = {part.lower() for path in self.images for part in self.format_path(path).split('/')[:-1]}
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            self.by_name[unicodedata.normalize('NFC', path.name)].append(path)

    def list_files(self, *suffixes: str) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def format_path(self, path: Path) -> str:
        """Return a path for messages: relative to the export if it is inside."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def infer_split(self, path: Path) -> str | None:
        """Return the split of a file from the names of its folders."""
        inside = path.is_relative_to(self.folder)
        return next(filter(None, map(parse_split, path.relative_to(self.folder).parts[:-1])), None) if inside else None

    def add_error(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.errors[kind].append(Place(self.format_path(path), detail=detail))

    def add_warning(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.warnings[kind].append(Place(self.format_path(path), detail=detail))

    def add_note(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.notes[kind].append(Place(self.format_path(path), detail=detail))

    def note_unused(self, things: str, fields: dict, known: Container[str], path: Path, detail: str = '') -> None:
        """Report the fields of an object or a file that contain information and are not used."""
        for name in [name for name, value in fields.items() if name not in known and is_set(value)]:
            self.add_note(f'{things} with "{name}", which is not used', path, detail)

    def find_image(
        self, name: str, label: Path, near: str = '', loosely: bool = False, split: str | None = None
    ) -> Path | None:
        """Find an image by the path that a label file or list states.

        Args:
            name: the stated path, from any machine.
            label: the file that states it; images in a folder of a different split do not match.
            near: name of a folder that must contain the image, if the export has it.
            loosely: whether the file name is enough if the stated folder, for instance of a URL, does not exist.
            split: the label file's split; by default that of its folder.

        Returns:
            The image at that path, or else the only one whose path ends with the stated path or is its end; None if
            there is no such image or several.
        """
        for spelling in list_spellings(name):
            if os.path.isfile(path := os.path.normpath(label.parent / spelling)):
                return Path(path)
        split, near = split or self.infer_split(label), near.lower() if near.lower() in self.folders else ''
        for spelling in list_spellings(name):
            stated = split_path(spelling)
            fits: dict[tuple[int, bool], list[Path]] = defaultdict(list)
            same = self.by_name.get(stated[-1], []) if stated else []
            same = [path for path in same if not near or near in self.format_path(path).lower().split('/')[:-1]]
            same = [path for path in same if split in (None, WHOLE) or self.infer_split(path) in (None, split)]
            for path in same:
                own = split_path(self.format_path(path))
                shared = min(len(own), len(stated))
                if own[-shared:] == stated[-shared:]:
                    fits[shared, own == stated].append(path)
            if fits and len(best := fits[max(fits)]) == 1:
                return best[0]
            if loosely and len(same) == 1 and not fits and stated[-2].lower() not in self.folders:
                self.add_note('images found by their file name, in a different folder', label, name)
                return same[0]
        return None

    def pair(self, images: Sequence[Path], labels: Sequence[Path], stated: dict[Path, str]) -> dict[Path, Path]:
        """Pair images with label files of the same name in the same folder, or anywhere if the name is unique.

        Args:
            images: the images.
            labels: the label files.
            stated: the image's file name in each label file; it decides between images of the same name.

        Returns:
            The label file of each image that has one. Several different candidates for an image are errors.
        """
        by_key: dict[tuple, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
        for side, paths in enumerate((images, labels)):
            for path in paths:
                by_key[self.make_key(path)][side].append(path)
        by_stem = defaultdict(list)
        for key, sides in by_key.items():
            if not all(sides):
                by_stem[key[1]].append((key[0], *sides))
        groups = [sides for sides in by_key.values() if all(sides)]
        for rest in by_stem.values():
            folders = sorted((folders for folders, *_ in rest), key=len)
            if len(rest) == 2 and is_within(*folders):
                groups.append(tuple(rest[0][side] + rest[1][side] for side in (1, 2)))
        pairs = {}
        for pictures, files in groups:
            contents = {path.read_bytes().strip() for path in files} if len(files) > 1 else ()
            if len(pictures) > 1:
                named = [path for path in pictures if len(files) == 1 and path.name == stated.get(files[0])]
                pictures = named if len(named) == 1 else pictures
            if not pictures or not files:
                continue
            if len(pictures) == 1 and len(contents) < 2:
                pairs[pictures[0]] = files[0]
                continue
            kind = 'images with several different label files: delete all but one'
            if len(pictures) > 1:
                kind = 'label files that fit several images of the same name: rename an image and its label file'
            self.add_error(kind, files[0], ', '.join(map(self.format_path, (*files[1:], *pictures))))
            self.used.update(files, pictures)
            self.unclear.update(pictures)
        return pairs

    def make_key(self, path: Path) -> tuple[tuple[str, ...], str]:
        parts = Path(self.format_path(path)).parts[:-1]
        stem = unicodedata.normalize('NFC', unquote(path.stem))  # Label Studio writes %20 for spaces
        return tuple(filter(None, map(strip_neutral, parts))), stem

    def report_unused(self) -> None:
        """Report every unused file, by kind."""
        for path in self.files:
            if path in self.used:
                continue
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                self.add_warning('images without a label file or an entry in a list, not used', path)
            elif suffix in OTHER_IMAGES:
                self.add_warning(f'images in {suffix}, not used: save them as PNG or JPEG', path)
            elif suffix in LABELS and not path.name.lower().startswith('readme'):
                self.add_warning('label files or lists without an image, not used', path)
            else:
                self.add_note('other files, not used', path)
        for path in self.hidden:
            self.add_note('hidden files and folders, not used', path)


def is_within(short: tuple, long: tuple) -> bool:
    """Return whether the folders of one path are the first or the last of the other."""
    return long[: len(short)] == short or long[len(long) - len(short) :] == short


class Builder:
    """Builder of a split, image by image. Category ids are class names until :func:`build_splits`."""

    def __init__(self, export: Export, name: str) -> None:
        self.export, self.name = export, name
        self.images: list[dict] = []
        self.paths: dict[Path, None] = {}
        self.annotations: list[dict] = []
        self.incomplete: set[int] = set()  # ids of images with an unreadable object

    def add_image(self, path: Path, labels: Path | None = None, size: Sequence[float] = ()) -> tuple[int, int] | None:
        """Add an image.

        Args:
            path: the image.
            labels: its label file.
            size: width and height in the label file; if missing or 0, those of the image.

        Returns:
            Width and height in pixels; None, after reporting an error, if the image cannot be added.
        """
        self.export.used.update(filter(None, (path, labels)))
        if path in self.paths:
            kind = 'images with several label files or entries'
            self.export.add_error(kind, labels or path, self.export.format_path(path))
            self.incomplete.add(list(self.paths).index(path) + 1)
            return None
        if not (len(size) == 2 and min(size) > 0):
            try:
                size = read_size(path)
            except Exception:  # decoders raise errors of any type for corrupt files
                self.export.add_error(DAMAGED, path)
                return None
        width, height = map(int, size)
        self.paths[path] = None
        self.images.append(dict(id=len(self.images) + 1, file_name='', width=width, height=height))
        return width, height

    def add_object(
        self,
        name: str,
        box: Sequence[float],
        polygons: Sequence[list[float]] = (),
        crowd: bool = False,
        masks: Sequence[tuple[int, int, np.ndarray]] = (),
    ) -> None:
        """Add an object to the last image.

        Args:
            name: the class.
            box: [x, y, width, height] in pixels.
            polygons: outlines, each [x, y, x, y, ...] in pixels.
            crowd: whether training and evaluation ignore the object.
            masks: parts of the mask, each as x, y and an array (H, W).
        """
        mask: dict = {}
        if masks:
            width, height = (self.images[-1][key] for key in ('width', 'height'))
            whole = np.zeros((height, width), np.uint8)
            for x, y, part in masks:
                place = whole[max(y, 0) : y + part.shape[0], max(x, 0) : x + part.shape[1]]
                place |= part[max(-y, 0) :, max(-x, 0) :][: place.shape[0], : place.shape[1]].astype(np.uint8)
            rle = mask_utils.encode(np.asfortranarray(whole))
            if polygons:
                rle = mask_utils.merge([rle, rasterise([clip(p, width, height) for p in polygons], width, height)])
            box, area = mask_utils.toBbox(rle).tolist(), float(mask_utils.area(rle))
            mask = dict(segmentation=dict(size=[height, width], counts=rle['counts'].decode()))
        elif polygons:
            area = sum(map(compute_polygon_area, polygons))
            mask = dict(segmentation=[[round(value, 3) for value in polygon] for polygon in polygons])
        else:
            area = box[2] * box[3]
        self.annotations.append(
            dict(
                id=len(self.annotations) + 1,
                image_id=len(self.images),
                category_id=name,
                bbox=[round(value, 3) for value in box],
                area=area,
                iscrowd=int(crowd),
                **mask,
            )
        )

    def add_fault(self, kind: str, path: Path, detail: str = '') -> None:
        """Report an unreadable object of the last image."""
        self.export.add_error(kind, path, detail)
        self.incomplete.add(len(self.images))


def build_splits(
    export: Export, kind: str, builders: Iterable[Builder], classes: Sequence[str] | None = None
) -> list[Split]:
    """Build splits.

    Args:
        export: their export.
        kind: name of the format.
        builders: one for each split.
        classes: all class names in order; by default those of the objects, sorted.
    """
    builders = list(builders)
    names = classes or sorted({str(a['category_id']) for builder in builders for a in builder.annotations})
    ids = {name: index for index, name in enumerate(names, start=1)}
    splits = []
    for builder in builders:
        root, files = locate_images(export, builder.name, list(builder.paths))
        for image, name in zip(builder.images, files, strict=True):
            image['file_name'] = name
        for annotation in builder.annotations:
            annotation['category_id'] = ids[annotation['category_id']]
        categories = [dict(id=index, name=name, supercategory='') for name, index in ids.items()]
        coco = dict(images=builder.images, annotations=builder.annotations, categories=categories)
        coco |= dict(info={}, licenses=[])
        title = f'{export.folder.name}, {kind}' + f', {builder.name}' * (builder.name != WHOLE)
        splits.append(Split(builder.name, coco, title, root, is_foreign=True, incomplete=builder.incomplete))
    return splits


def locate_images(export: Export, name: str, paths: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return a folder that contains all images, and their names relative to it.

    If some images are outside of the export, this is a folder of links.
    """
    if not paths:
        return export.folder, []
    root = Path(os.path.commonpath([path.parent for path in paths]))
    if root not in export.folder.parents:
        return root, [path.relative_to(root).as_posix() for path in paths]
    root, files = export.scratch / 'links' / name, []
    for path in paths:
        above = next(
            folder for folder in (export.folder, export.scratch, Path(path.anchor)) if path.is_relative_to(folder)
        )
        files.append(path.relative_to(above).as_posix())
        target = root / files[-1]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return root, files


def group_by_split(export: Export, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by the split in the names of their folders; without such folders, all files form one group.

    If some folders are named after splits, files outside of them are left out.
    """
    groups = defaultdict(list)
    for path in paths:
        groups[export.infer_split(path)].append(path)
    if set(groups) == {None}:
        return {WHOLE: groups[None]}
    return {split: groups[split] for split in SPLITS if split in groups}


def compute_box(points: Sequence[float]) -> list[float]:
    """Compute the box [x, y, width, height] around points [x, y, x, y, ...]."""
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def outline_ellipse(x: float, y: float, rx: float, ry: float) -> list[float]:
    """Return a polygon [x, y, x, y, ...] of an axis-aligned ellipse."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1).ravel().tolist()


def clip(points: Sequence[float], width: float, height: float) -> list[float]:
    """Clip points [x, y, x, y, ...] to the image."""
    return [min(max(value, 0), (width, height)[i % 2]) for i, value in enumerate(points)]


def require_unique(names: Sequence[str], path: Path) -> list[str]:
    """Check that class names are non-empty and unique.

    Raises:
        InputError: if not.
    """
    if not names or not all(names):
        raise InputError(f'{path}: a class has no name. Add it')
    ((name, count),) = Counter(names).most_common(1)
    if count > 1:
        raise InputError(f'{path}: {count} classes have the name {name!r}. Make the names unique')
    return list(names)
