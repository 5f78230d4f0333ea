"""Check a data set in COCO's layout before training on it, take a part of it, or split what a labelling tool wrote.

    python tools/prepare_coco.py FOLDER                                       # annotations/, train*/ and val*/
    python tools/prepare_coco.py FOLDER --subset 0.1 --out DIR                # a tenth of each split
    python tools/prepare_coco.py IMAGES --annotations FILE --val 0.2 --out DIR

The first reads every annotation and decodes every image. Errors are what would stop or spoil a training, warnings what
may be meant so. The other two check likewise what they take, and write DIR only where there is no error. The same seed
takes the same images.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import spec_mmdet  # noqa: F401  (before MMDetection: it provides mmcv's operators)

# isort: split
import mmcv
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from spec_mmdet.cli import command_line
from spec_mmdet.data import find_split
from spec_mmdet.errors import InputError
from spec_mmdet.preflight import check_categories, read_coco

TOLERANCE = 2.0  # pixels: tools round, and COCO's own boxes and polygons touch the border
EXIF_ORIENTATION = 0x0112
Image.MAX_IMAGE_PIXELS = None  # large images are expected here


@dataclass
class Findings:
    """What is wrong, by kind: where each case of it was found."""

    errors: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def print(self) -> None:
        for title, kinds in (('errors, to be put right', self.errors), ('warnings', self.warnings)):
            if kinds:
                print(f'\n{title}:')
            for kind, where in kinds.items():
                print(f'{len(where):>8}  {kind}; first: {where[0]}')


def are_numbers(values: object) -> bool:
    """Whether this is a list of finite numbers: JSON's parser takes NaN and Infinity too."""
    return isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def outside(xs: Sequence[float], ys: Sequence[float], width: float, height: float) -> bool:
    low, high = -TOLERANCE, TOLERANCE
    return min(*xs, *ys) < low or max(xs) > width + high or max(ys) > height + high


def fault_of_box(box: list, width: float, height: float) -> str:
    """What is wrong with a box [x, y, width, height] in an image of this size, in pixels; '' where nothing is."""
    if not are_numbers(box) or len(box) != 4:
        return 'boxes that are not four finite numbers [x, y, width, height]'
    x, y, w, h = box
    if w < 0 or h < 0:
        return 'boxes of negative width or height'
    return 'boxes that reach out of their image' if outside((x, x + w), (y, y + h), width, height) else ''


def fault_of_mask(mask: object, width: float, height: float) -> str:
    """What is wrong with a segmentation in an image of this size, in pixels; '' where nothing is."""
    if not mask:
        return 'objects without a mask ("segmentation"), which Mask R-CNN learns from'
    if isinstance(mask, list):
        for polygon in mask:
            if not are_numbers(polygon):
                return 'polygons that are not lists [x, y, x, y, ...] of finite numbers'
            if len(polygon) < 6 or len(polygon) % 2:
                return 'polygons of fewer than 6 coordinates or an odd number of them'
            if outside(polygon[::2], polygon[1::2], width, height):
                return 'polygons that reach out of their image'
        return ''
    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), list | str):
        return 'masks that are neither polygons nor RLE'
    if mask.get('size') != [height, width]:
        return 'RLE masks whose size [height, width] is not that of their image'
    counts = mask['counts']
    if isinstance(counts, list):
        whole = are_numbers(counts) and len(counts) > 1 and min(counts) >= 0 and sum(counts) == width * height
    else:
        try:
            whole = mask_utils.decode(mask).any()
        except ValueError:
            whole = False
    return '' if whole else 'RLE masks that are empty or whose runs do not make up their image'


def is_used(annotation: dict) -> bool:
    """Whether MMDetection makes use of an object: without a word it leaves out the small and those without an area."""
    box = annotation['bbox']
    return not fault_of_box(box, math.inf, math.inf) and min(box[2:]) >= 1 and annotation['area'] > 0


def check_annotations(coco: dict, name: str, found: Findings) -> None:
    """Check what an annotation file says of its images and objects, the images themselves not being looked at.

    Args:
        coco: its content, from :func:`read_coco`.
        name: what to call it.
        found: what is wrong is added here.
    """
    errors, warnings = found.errors, found.warnings
    for key in ('images', 'annotations'):
        for index, count in Counter(entry['id'] for entry in coco[key]).items():
            if count > 1:
                errors[f'ids that several {key} have'].append(f'{index} in {name}')
    for image in coco['images']:
        path = Path(image['file_name'])
        if path.is_absolute() or '..' in path.parts:
            errors['file names that lead out of the image folder'].append(f'{image["file_name"]} in {name}')

    images = {image['id']: image for image in coco['images']}
    categories = {category['id'] for category in coco['categories']}
    for annotation in coco['annotations']:
        where = f'annotation {annotation["id"]} in {name}'
        image = images.get(annotation['image_id'])
        if image is None:
            errors['annotations of an image_id that no image has'].append(where)
            continue
        where = f'annotation {annotation["id"]} of {image["file_name"]} in {name}'
        if annotation['category_id'] not in categories:
            errors['annotations of a category_id that no category has'].append(where)
        fault = fault_of_box(annotation['bbox'], image['width'], image['height'])
        if fault:
            errors[fault].append(where)
        elif not is_used(annotation):
            if min(annotation['bbox'][2:]) < 1:  # COCO has a few
                warnings['boxes narrower or lower than a pixel, which MMDetection leaves out'].append(where)
            else:
                errors['objects whose "area" is not above 0, which MMDetection leaves out'].append(where)
        fault = fault_of_mask(annotation.get('segmentation'), image['width'], image['height'])
        if fault:
            errors[fault].append(where)


def check_contents(coco: dict, name: str, found: Findings) -> None:
    """Check that a split has something to learn or to be measured on in each of its classes and images."""
    used = [annotation for annotation in coco['annotations'] if is_used(annotation)]
    categories, images = ({annotation[key] for annotation in used} for key in ('category_id', 'image_id'))
    for category in coco['categories']:
        if category['id'] not in categories:
            found.warnings['classes without an object'].append(f'{category["name"]} in {name}')
    for image in coco['images']:
        if image['id'] not in images:
            found.warnings['images without an object'].append(f'{image["file_name"]} in {name}')
    if not used:
        found.errors['splits without an object'].append(name)


def check_image(path: Path, height: float, width: float) -> tuple[str, str, bytes]:
    """Decode an image as the training will, and by PIL, which minds a missing end where an older OpenCV does not.

    MMDetection turns images as their EXIF orientation says, and so do the tools that people label with; then the size
    in the annotation file is that of the turned image.

    Returns:
        What is wrong, what may be, and a digest of the file's content.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return 'images that are not there', '', b''
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            turned = image.getexif().get(EXIF_ORIENTATION, 1) not in (0, 1)
        size = mmcv.imfrombytes(content).shape[:2]
    except Exception:  # a damaged file can make the decoders raise anything
        return 'images that cannot be decoded to their end', '', b''
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if size == (height, width):
        doubt = 'images with an EXIF orientation, which training follows: were they labelled as turned by it?'
        return '', doubt if turned else '', digest
    if turned and size == (width, height):
        return 'images that their EXIF orientation turns, but their labels do not: save them turned', '', digest
    return 'images of another size than the annotation file says', '', digest


def check_images(coco: dict, folder: Path, name: str, found: Findings) -> dict[bytes, str]:
    """Decode all images of an annotation file.

    Args:
        coco: its content.
        folder: where the images are.
        name: what to call it.
        found: what is wrong is added here.

    Returns:
        The name of the image of each digest.
    """
    images, digests = coco['images'], {}
    with ThreadPoolExecutor() as pool:  # decoding lets go of Python's lock
        results = pool.map(
            lambda image: check_image(folder / image['file_name'], image['height'], image['width']), images
        )
        for (error, warning, digest), image in zip(tqdm(results, name, len(images)), images):
            where = f'{image["file_name"]} in {folder}'
            if error:
                found.errors[error].append(where)
            if warning:
                found.warnings[warning].append(where)
            if digest in digests:
                found.warnings['images that are there twice'].append(f'{where}, which is {digests[digest]}')
            if digest:
                digests[digest] = image['file_name']
    return digests


def print_counts(splits: dict[str, dict]) -> None:
    """A table: how many images there are, and how many objects of each class, split by split."""
    counts = []
    for coco in splits.values():
        names = {category['id']: category['name'] for category in coco['categories']}
        counts.append(Counter(names.get(annotation['category_id']) for annotation in coco['annotations']))
    rows = [('', *splits), ('images', *(len(coco['images']) for coco in splits.values()))]
    rows += [(name, *(count[name] for count in counts)) for name in names.values()]
    width = max(len(row[0]) for row in rows)
    for name, *columns in rows:
        print(f'{name:{width}}' + ''.join(f'{column:>10}' for column in columns))


def part_of(coco: dict, images: list[dict]) -> dict:
    """An annotation file's content for these of its images alone; everything else in it is kept."""
    chosen = {image['id'] for image in images}
    annotations = [annotation for annotation in coco['annotations'] if annotation['image_id'] in chosen]
    return {**coco, 'images': images, 'annotations': annotations}


def draw(images: list[dict], amount: float, seed: int) -> list[dict]:
    """So many of the images, or such a fraction if it is below 1, at random but in their order."""
    count = min(len(images), max(1, round(amount * len(images) if amount < 1 else amount)))
    return [images[i] for i in sorted(random.Random(seed).sample(range(len(images)), count))]


def write_split(out: Path, split: str, coco: dict, folder: Path) -> None:
    """Write a split in COCO's layout, the images as hard links where the file system has them."""
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    for name in {image['file_name'] for image in coco['images']}:
        source, target = (folder / name).resolve(), out / split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def count_or_fraction(text: str) -> float:
    """A number of images from 1 on, or a fraction below 1."""
    value = float(text)
    if not 0 < value < 1 and not (value >= 1 and value.is_integer()):
        raise ValueError
    return value


@command_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help="in COCO's layout; with --annotations, where the images are")
    parser.add_argument('--out', type=Path, metavar='DIR', help='a new folder to write, in the same layout')
    parser.add_argument(
        '--subset', type=count_or_fraction, help='take so many images of each split, or a fraction below 1'
    )
    parser.add_argument('--annotations', type=Path, metavar='FILE', help='the one annotation file that there is')
    parser.add_argument('--val', type=count_or_fraction, help='how many of its images are for validation, or a fraction'
                        ' (default: 0.2)')  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='of the random choice of images')
    args = parser.parse_args()

    folder, out = args.folder, args.out
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder')
    if (args.subset is not None) + (args.annotations is not None) != (out is not None):
        raise InputError('--out DIR goes with one of --subset and --annotations')
    if args.val and not args.annotations:
        raise InputError('--val goes with --annotations')
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f'--out {out}: is there already')

    splits: dict[str, tuple[dict, Path]] = {}  # content of the annotation file, image folder
    found = Findings()
    if args.annotations:
        coco = read_coco(args.annotations)
        check_annotations(coco, args.annotations.name, found)
        val = draw(coco['images'], args.val or 0.2, args.seed)
        chosen = {image['id'] for image in val}
        splits['train'] = part_of(coco, [image for image in coco['images'] if image['id'] not in chosen]), folder
        splits['val'] = part_of(coco, val), folder
        if not splits['train'][0]['images']:
            raise InputError(f'{args.annotations}: has {len(val)} images, of which --val leaves none for training')
    else:
        classes = None
        for split in ('train', 'val'):
            if paths := find_split(folder, split):
                coco, name = read_coco(paths[0]), paths[0].name
                names = [category['name'] for category in coco['categories']]
                classes = classes or names
                check_categories(paths[0], names, classes)
                check_annotations(coco, name, found)
                if args.subset:
                    coco = part_of(coco, draw(coco['images'], args.subset, args.seed))
                splits[split] = coco, paths[1]
        if not splits:
            raise InputError(f'{folder}: neither annotations/instances_train*.json nor annotations/instances_val*.json')

    digests = {}
    for split, (coco, images) in splits.items():
        check_contents(coco, split, found)
        digests[split] = check_images(coco, images, split, found)
    for digest, name in digests.get('val', {}).items():
        if digest in digests.get('train', {}):
            found.warnings['images for validation that are trained on'].append(f'{name} in val')
    print_counts({split: coco for split, (coco, _) in splits.items()})
    found.print()
    print()
    if found.errors:
        raise InputError(f'{folder}: not ready for training; the errors listed above are to be put right')
    if 'val' not in splits:
        raise InputError(
            f'{folder}: not ready for training; it lacks images for validation (--annotations splits some off)'
        )
    if out:
        for split, (coco, images) in splits.items():
            write_split(out, split if args.annotations else images.name, coco, images)
        print(f'wrote {out}')
    if 'train' in splits:
        print(f'ready for training: python tools/train.py CONFIG --data {out or folder}')
    else:
        print(
            f'ready for tools/test.py --data {out or folder}; for training it lacks annotations/instances_train*.json'
        )


if __name__ == '__main__':
    main()
