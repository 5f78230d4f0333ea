"""Check a data set in COCO's layout before training on it, take a part of it, or split what a labelling tool wrote.

    spec-mmdet prepare FOLDER                                       # annotations/, train*/ and val*/
    spec-mmdet prepare FOLDER --subset 0.1 --out DIR                # a tenth of each split
    spec-mmdet prepare IMAGES --annotations FILE --val 0.2 --out DIR

The first reads every annotation and decodes every image. Errors are what would stop or spoil a training, warnings what
may be meant so. The other two check likewise what they take, and write DIR only where there is no error. The same seed
takes the same images.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..data.checks import Findings, check_annotations, check_categories, check_contents, check_images, read_coco
from ..data.folders import find_split
from ..errors import InputError
from .common import parser


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


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('prepare', __doc__)
    options.add_argument('folder', type=Path, help="in COCO's layout; with --annotations, where the images are")
    options.add_argument('--out', type=Path, metavar='DIR', help='a new folder to write, in the same layout')
    options.add_argument(
        '--subset', type=count_or_fraction, help='take so many images of each split, or a fraction below 1'
    )
    options.add_argument('--annotations', type=Path, metavar='FILE', help='the one annotation file that there is')
    options.add_argument('--val', type=count_or_fraction, help='how many of its images are for validation, or a '
                        'fraction (default: 0.2)')  # fmt: skip
    options.add_argument('--seed', type=int, default=0, help='of the random choice of images')
    args = options.parse_args(argv)

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
        print(f'ready for training: spec-mmdet train CONFIG --data {out or folder}')
    else:
        print(
            f'ready for spec-mmdet test --data {out or folder}; for training it lacks annotations/instances_train*.json'
        )
