"""Check a data set before training on it, split it, take a part of it, or write it in COCO's layout.

    spec-mmdet prepare FOLDER                                       # annotations/, train*/ and val*/
    spec-mmdet prepare FOLDER --val 0.2 --out DIR                   # what a labelling tool wrote, see below
    spec-mmdet prepare FOLDER --drop --out DIR                      # without what is faulty
    spec-mmdet prepare FOLDER --subset 0.1 --out DIR                # a tenth of each split
    spec-mmdet prepare IMAGES --annotations FILE --val 0.2 --out DIR

FOLDER may also be an export of Roboflow, CVAT or Label Studio, or be in the format of YOLO, Pascal VOC or LabelMe.

The first reads every annotation and decodes every image. Errors are what would stop or spoil a training, warnings what
may be meant so; all of them go to a file. The others check likewise what they take, and write DIR only where there is
no error, or, with --drop, without the images and objects that have one. The same seed takes the same images.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.checks import check_annotations, check_categories, check_contents, without_faults
from ..data.findings import Findings, Place
from ..data.folders import find_split, find_whole, pairs_of, relocate
from ..data.formats import WHOLE, read_folder
from ..data.images import check_images
from ..data.reading import read_coco
from ..data.splits import draw_for_validation
from ..errors import InputError, prefix_errors
from ..files import is_empty, write_folder_atomically
from .common import parser


@dataclass
class Split:
    """An annotation file's content, where it is from, and the folder of its images."""

    name: str  # train, val, or all of what is still to be split
    coco: dict
    ann_file: Path
    images: Path
    is_part: bool = False  # of the annotation file
    is_foreign: bool = False  # in a layout or format that training does not read

    @property
    def title(self) -> str:
        """What to call it: Roboflow's annotation files all have the same name."""
        name = '/'.join(self.ann_file.parts[-2:])
        return f'{name}, {self.name}' if self.is_part else name


def print_counts(splits: list[Split]) -> None:
    """A table: how many images there are, and how many objects of each class, split by split."""
    counts = []
    for split in splits:
        names = {category['id']: category['name'] for category in split.coco['categories']}
        counts.append(Counter(names.get(annotation['category_id']) for annotation in split.coco['annotations']))
    rows = [('', *(split.name for split in splits)), ('images', *(len(split.coco['images']) for split in splits))]
    rows += [(name, *(count[name] for count in counts)) for name in names.values()]
    width = max(len(row[0]) for row in rows)
    for name, *columns in rows:
        print(f'{name:{width}}' + ''.join(f'{column:>10}' for column in columns))


def part_of(coco: dict, images: list[dict]) -> dict:
    """An annotation file's content without its other images and what lies in them; everything else in it is kept."""
    left_out = {image['id'] for image in coco['images']} - {image['id'] for image in images}
    annotations = [annotation for annotation in coco['annotations'] if annotation['image_id'] not in left_out]
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


def find_splits(folder: Path, found: Findings) -> list[Split]:
    """The splits of a folder, whose categories must be the same, or the one that is still to be split."""
    splits = other_splits(folder, found)
    if splits:
        return splits
    for name in ('train', 'val'):
        if paths := find_split(folder, name):
            split = Split(name, read_coco(paths[0], found=found), *paths)
            splits.append(split)
            names = [[category['name'] for category in s.coco['categories']] for s in (split, splits[0])]
            check_categories(paths[0], *names)
    if not splits:
        raise InputError(
            f'{folder}: neither annotations/instances_train*.json nor annotations/instances_val*.json, nor labels of '
            'YOLO, Pascal VOC or LabelMe'
        )
    return splits


def other_splits(folder: Path, found: Findings) -> list[Split]:
    """The splits of a folder that is neither in COCO's layout nor in Roboflow's; none of one that is."""
    if any(any(pairs_of(folder, name)) for name in ('train', 'val')):
        return []
    if whole := find_whole(folder):
        coco = read_coco(whole[0], found=found)
        print(f'one file of annotations: {whole[0]}, of the images in {whole[1]}')
        if moved := relocate(coco, whole[1]):
            print(f'{moved} images are found there by their names without folders')
        return [Split(WHOLE, coco, *whole, is_foreign=True)]
    if read := read_folder(folder):
        kind, parts = read
        print(f'{folder}: in the format of {kind}')
        return [Split(name, coco, folder / kind, images, is_foreign=True) for name, (coco, images) in parts.items()]
    return []


def split_off(whole: Split, amount: float, seed: int) -> list[Split]:
    """Two splits, of which the one for validation has so many images."""
    images = whole.coco['images']
    count = min(len(images), max(1, round(amount * len(images) if amount < 1 else amount)))
    chosen = draw_for_validation(whole.coco, count, seed)
    val, train = ([image for image in images if (image['id'] in chosen) == side] for side in (True, False))
    if not train:
        raise InputError(f'{whole.ann_file}: has {len(val)} images, of which --val leaves none for training')
    parts = dict(train=train, val=val)
    return [replace(whole, name=name, is_part=True, coco=part_of(whole.coco, part)) for name, part in parts.items()]


def check(splits: list[Split], found: Findings) -> dict[Path, bytes]:
    """Look at every annotation and every image; returns a digest of each whole image."""
    digests: dict[Path, bytes] = {}
    for split in splits:
        check_annotations(split.coco, split.title, found)
        digests |= check_images(enumerate(split.coco['images']), split.images, split.title, found)
    return digests


def drop(splits: list[Split], found: Findings) -> list[Split]:
    """The splits without what has an error, which is no error of theirs any more."""
    sound = []
    for split in splits:
        sound.append(replace(split, coco=without_faults(split.coco, split.title, found)))
        images, annotations = (len(split.coco[key]) - len(sound[-1].coco[key]) for key in ('images', 'annotations'))
        print(f'left out of {split.title}: {images} images, {annotations} annotations')
    found.drop_errors()
    return sound


def check_splits(splits: list[Split], digests: dict[Path, bytes], found: Findings) -> None:
    """Check that there is something to learn from and to measure by, and that the two are not the same."""
    learnt = set()
    for split in splits:
        check_contents(split.coco, split.title, found, training=split.name == 'train')
        for image in split.coco['images']:
            digest = digests.get(split.images / image['file_name'])
            if split.name == 'train':
                learnt.add(digest)
            elif digest and digest in learnt:
                place = Place(split.title, image['file_name'])
                found.warnings['images for validation that are trained on'].append(place)


def conclude(splits: list[Split], found: Findings, folder: Path, listing: Path) -> None:
    """Print what was found, write it whole, and stop if there is an error in it."""
    print_counts(splits)
    found.print()
    if any(found.rows()):
        found.write(listing)
        print(f'\nall of them: {listing}')
    print()
    with prefix_errors(f'{folder}: not ready for training'):
        found.require_none(f'All are listed in {listing}; --drop --out DIR leaves what has one out')


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser('prepare', __doc__)
    options.add_argument('folder', type=Path, help="in COCO's layout or another one; with --annotations, where the "
                         'images are')  # fmt: skip
    options.add_argument('--out', type=Path, metavar='DIR', help='a new folder to write, in the same layout')
    options.add_argument('--drop', action='store_true', help='leave images and objects with an error out of DIR')
    options.add_argument(
        '--subset', type=count_or_fraction, help='take so many images of each split, or a fraction below 1'
    )
    options.add_argument('--annotations', type=Path, metavar='FILE', help='the one annotation file that there is')
    options.add_argument('--val', type=count_or_fraction, help='how many of its images are for validation, or a '
                        'fraction (default: 0.2)')  # fmt: skip
    options.add_argument('--seed', type=int, default=0, help='of the random choice of images')
    options.add_argument('--findings', type=Path, metavar='FILE', help='a CSV file for all that is found (default: '
                        'work_dirs/prepare/FOLDER.csv)')  # fmt: skip
    args = options.parse_args(argv)
    if not args.folder.is_dir():
        raise InputError(f'{args.folder}: no such folder')
    if args.subset is not None and args.annotations is not None:
        raise InputError('--subset and --annotations do not go together')
    if (args.drop or args.subset or args.annotations or args.val) and not args.out:
        raise InputError('--out DIR says where to write what --subset, --annotations, --val or --drop leave')
    if args.out and args.out.exists() and not is_empty(args.out):
        raise InputError(f'--out {args.out}: is there already')
    args.findings = args.findings or Path('work_dirs/prepare') / f'{args.folder.resolve().name}.csv'
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    folder, out = args.folder, args.out
    found = Findings()
    if args.annotations:
        splits = [Split(WHOLE, read_coco(args.annotations, found=found), args.annotations, folder)]
    else:
        splits = find_splits(folder, found)
    if args.subset:
        for split in splits:
            split.coco = part_of(split.coco, draw(split.coco['images'], args.subset, args.seed))
    digests = check(splits, found)
    if found.errors and args.drop:
        splits = drop(splits, found)
    whole = splits[0].name == WHOLE or bool(args.val)
    if args.val and len(splits) > 1:
        raise InputError(f'{folder}: has images for validation already, without --val')
    if not found.errors:
        if whole:
            splits = split_off(splits[0], args.val or 0.2, args.seed)
        check_splits(splits, digests, found)
    conclude(splits, found, folder, args.findings)

    names = [split.name for split in splits]
    if 'val' not in names:
        raise InputError(
            f'{folder}: not ready for training; it lacks images for validation (--val 0.2 --out DIR splits some off)'
        )
    if out:
        with write_folder_atomically(out) as aside:
            for split in splits:
                as_it_was = split.images.name.startswith(split.name) and not whole  # train2017
                write_split(aside, split.images.name if as_it_was else split.name, split.coco, split.images)
        print(f'wrote {out}')
    elif splits[0].is_foreign:
        print(f"in order, but training reads COCO's layout: spec-mmdet prepare {folder} --out DIR writes it")
        return
    if 'train' in names:
        print(f'ready for training: spec-mmdet train CONFIG --data {out or folder}')
    else:
        print(
            f'ready for spec-mmdet test --data {out or folder}; for training it lacks annotations/instances_train*.json'
        )
