"""An exported folder: its files, which of them were used, and COCO dicts built from what they contain."""

from __future__ import annotations

import mimetypes
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from ...errors import InputError
from ..findings import Findings, Place
from ..images import DAMAGED, EXIF_ORIENTATION, IMAGE_SUFFIXES, allow_large_images
from ..rules import area_of_polygon, rasterised
from ..splits import WHOLE, Split

SPLITS = dict(train=('train', 'training'), val=('val', 'valid', 'validation'), test=('test', 'testing'))
JUNK = {'__macosx', '@eadir', 'thumbs.db', 'desktop.ini'}
MISSING = 'images that are not there'
LABELS = {'.txt', '.xml', '.json', '.jsonl', '.ndjson', '.csv'}
# Folders that separate labels from images, so that they are no part of what both paths have in common.
NEUTRAL = set('images labels annotations jpegimages data img imgs image ann json jsons xml xmls txt'.split())  # noqa: SIM905


def parse_split(name: str) -> str | None:
    """Return the split that a folder, list or subset is named after, as 'Train', 'train2017' or 'valid' are."""
    word = name.lower().rstrip('0123456789').rstrip('_-')
    return next((split for split, words in SPLITS.items() if word in words), None)


def list_spellings(name: str) -> Iterator[str]:
    """Yield an image's path as written, then without Label Studio's and browsers' escapes and queries."""
    name = name.replace('\\', '/')
    yield from dict.fromkeys([name, unquote(name), unquote(name.partition('?d=')[2] or name.partition('?')[0])])


def split_path(name: str) -> tuple[str, ...]:
    """The components of a path in one Unicode form, without leading '.', '..' and drives."""
    parts = unicodedata.normalize('NFC', name).split('/')
    return tuple(part for part in parts if part not in ('', '.', '..') and not part.endswith(':'))


def is_junk(name: str) -> bool:
    return name.startswith('.') or name.lower() in JUNK


def read_size(path: Path) -> tuple[int, int]:
    """Read an image's width and height from its header, turned by its EXIF orientation as training turns it."""
    with allow_large_images(), Image.open(path) as image:
        # The base class's method: that of PNG decodes the image.
        turned = Image.Image.getexif(image).get(EXIF_ORIENTATION) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: if it cannot be read as such.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f'{path}: cannot be read as text in UTF-8. Save it in this encoding') from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that contain anything, without white space around them."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


class Export:
    """The files of a folder, without hidden ones, and which of them were used.

    Args:
        folder: the export's.
        found: faults and unused files are added here.
        scratch: a temporary folder for images that exist only inside label files.
        zero_based: whether Pascal VOC's coordinates count from 0, not from 1.
    """

    def __init__(self, folder: Path, found: Findings, scratch: Path, zero_based: bool = False) -> None:
        self.folder, self.scratch = Path(os.path.abspath(folder)), Path(os.path.abspath(scratch))
        self.found, self.zero_based = found, zero_based
        self.used: set[Path] = set()
        self.unclear: set[Path] = set()  # images with an error in which label file is theirs
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
        """A path as messages name it: relative to the export where it lies in it."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)

    def infer_split(self, path: Path) -> str | None:
        """The split that one of the folders above a file is named after."""
        inside = path.is_relative_to(self.folder)
        return next(filter(None, map(parse_split, path.relative_to(self.folder).parts[:-1])), None) if inside else None

    def add_error(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.errors[kind].append(Place(self.format_path(path), detail=detail))

    def add_warning(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.warnings[kind].append(Place(self.format_path(path), detail=detail))

    def add_note(self, kind: str, path: Path, detail: str = '') -> None:
        self.found.notes[kind].append(Place(self.format_path(path), detail=detail))

    def find_image(
        self, name: str, label: Path, near: str = '', loosely: bool = False, split: str | None = None
    ) -> Path | None:
        """Find an image by the path that a label file or list states.

        Args:
            name: the stated path, of any machine.
            label: the file that states it; images of another split's folder do not fit.
            near: a folder that the image is in, where the export has one of this name.
            loosely: whether the file name alone decides where the export lacks the stated folder, as of a server's URL.
            split: the label file's split; by default that of its folder.

        Returns:
            The image at that place, or the one whose path in the export ends with the stated one, or the reverse; None
            where there is none or several.
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
                self.add_note('images found by their file name, in another folder than stated', label, name)
                return same[0]
        return None

    def pair(self, images: Sequence[Path], labels: Sequence[Path], stated: dict[Path, str]) -> dict[Path, Path]:
        """Pair images with label files of the same name in the same place, or of the only such name.

        Args:
            images: images, of which those in no pair have no label file.
            labels: label files.
            stated: the image's file name that a label file contains; it decides between images of one name.

        Returns:
            The label file of each image. Several files that could be an image's are errors, unless they are equal.
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
            kind = 'label files of different content for one image: delete all but one'
            if len(pictures) > 1:
                kind = 'label files of several images of one name: rename an image and its label file'
            self.add_error(kind, files[0], ', '.join(map(self.format_path, (*files[1:], *pictures))))
            self.used.update(files, pictures)
            self.unclear.update(pictures)
        return pairs

    def make_key(self, path: Path) -> tuple[tuple[str, ...], str]:
        parts = Path(self.format_path(path)).parts[:-1]
        stem = unicodedata.normalize('NFC', unquote(path.stem))  # Label Studio's label files may have %20 for blanks
        return tuple(part for part in parts if part.lower() not in NEUTRAL), stem

    def report_unused(self) -> None:
        """Add every file that was not used to the findings, by kind."""
        for path in self.files:
            if path in self.used:
                continue
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                self.add_warning('images that no label file and no list names, not used', path)
            elif (mimetypes.guess_type(path.name)[0] or '').startswith('image/'):
                self.add_warning(f'images in {suffix}, not used: save them as PNG or JPEG', path)
            elif suffix in LABELS and not path.name.lower().startswith('readme'):
                self.add_warning('label files or lists that belong to no image, not used', path)
            else:
                self.add_note('other files, not used', path)
        for path in self.hidden:
            self.add_note('hidden files and folders, not used', path)


def is_within(short: tuple, long: tuple) -> bool:
    """Test whether the folders of one path are the first or the last of another's."""
    return long[: len(short)] == short or long[len(long) - len(short) :] == short


class Builder:
    """A split that grows image by image. Category ids are class names until :func:`build_splits`."""

    def __init__(self, export: Export, name: str) -> None:
        self.export, self.name = export, name
        self.images: list[dict] = []
        self.paths: dict[Path, None] = {}
        self.annotations: list[dict] = []
        self.incomplete: set[int] = set()  # ids of images with an object that cannot be read

    def add_image(self, path: Path, labels: Path | None = None, size: Sequence[float] = ()) -> tuple[int, int] | None:
        """Add an image.

        Args:
            path: the image.
            labels: its label file.
            size: its width and height as the label file states them; by default, and where they are 0, the image's.

        Returns:
            Its width and height in pixels; None, and an error in the findings, where it is not added.
        """
        self.export.used.update(filter(None, (path, labels)))
        if path in self.paths:
            kind = 'images that several label files or entries name'
            self.export.add_error(kind, labels or path, self.export.format_path(path))
            self.incomplete.add(list(self.paths).index(path) + 1)
            return None
        if not (len(size) == 2 and min(size) > 0):
            try:
                size = read_size(path)
            except Exception:  # a damaged file can make the decoders raise anything
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
        """Add an object of the last image.

        Args:
            name: its class.
            box: [x, y, width, height] in pixels.
            polygons: its outlines, each [x, y, x, y, ...] in pixels.
            crowd: whether it is neither used for training nor counted.
            masks: parts of its mask, each as x, y and an array (H, W).
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
                rle = mask_utils.merge([rle, rasterised([clip(p, width, height) for p in polygons], width, height)])
            box, area = mask_utils.toBbox(rle).tolist(), float(mask_utils.area(rle))
            mask = dict(segmentation=dict(size=[height, width], counts=rle['counts'].decode()))
        elif polygons:
            area = sum(map(area_of_polygon, polygons))
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
        """Add an error: the last image has an object that cannot be read."""
        self.export.add_error(kind, path, detail)
        self.incomplete.add(len(self.images))


def build_splits(
    export: Export, kind: str, builders: Iterable[Builder], classes: Sequence[str] | None = None
) -> list[Split]:
    """Finish splits.

    Args:
        export: what they were read from.
        kind: the name of the format.
        builders: one a split.
        classes: all class names in their order; by default those of the objects, sorted.
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
        coco = dict(
            info={},
            licenses=[],
            images=builder.images,
            annotations=builder.annotations,
            categories=[dict(id=index, name=name, supercategory='') for name, index in ids.items()],
        )
        title = f'{export.folder.name}, {kind}' + f', {builder.name}' * (builder.name != WHOLE)
        splits.append(Split(builder.name, coco, title, root, is_foreign=True, incomplete=builder.incomplete))
    return splits


def locate_images(export: Export, name: str, paths: Sequence[Path]) -> tuple[Path, list[str]]:
    """Return a folder that contains all of these images, and their names relative to it.

    Images inside and outside the export get one folder of links.
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
    """Group files by the split that their folders are named after; all are one where no folder is.

    Where some folders are splits, files outside of them belong to none.
    """
    groups = defaultdict(list)
    for path in paths:
        groups[export.infer_split(path)].append(path)
    if set(groups) == {None}:
        return {WHOLE: groups[None]}
    return {split: groups[split] for split in SPLITS if split in groups}


def compute_box(points: Sequence[float]) -> list[float]:
    """The box [x, y, width, height] around points [x, y, x, y, ...]."""
    xs, ys = points[::2], points[1::2]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def outline_ellipse(x: float, y: float, rx: float, ry: float) -> list[float]:
    """A polygon [x, y, x, y, ...] of an axis-aligned ellipse."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1).ravel().tolist()


def clip(points: Sequence[float], width: float, height: float) -> list[float]:
    """Points [x, y, x, y, ...] moved into the image."""
    return [min(max(value, 0), (width, height)[i % 2]) for i, value in enumerate(points)]


def require_unique(names: Sequence[str], path: Path) -> list[str]:
    """Check that class names are there and differ from each other.

    Raises:
        InputError: if not.
    """
    if not names or not all(names):
        raise InputError(f'{path}: a class has no name')
    ((name, count),) = Counter(names).most_common(1)
    if count > 1:
        raise InputError(f'{path}: {count} classes have the name {name!r}; give each its own name')
    return list(names)
