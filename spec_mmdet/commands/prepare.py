"""Check a data set before training on it, split it, take a part of it, or write it in COCO's layout.

    spec-mmdet prepare FOLDER                                       # annotations/, train*/ and val*/
    spec-mmdet prepare EXPORT --val 0.2 --out DIR                   # what a labelling tool wrote, see below
    spec-mmdet prepare FOLDER --drop --out DIR                      # without what is faulty
    spec-mmdet prepare FOLDER --subset 0.1 --out DIR                # a tenth of each split
    spec-mmdet prepare IMAGES --annotations FILE --val 0.2 --out DIR

EXPORT is a folder or a .zip in one of these formats:
{formats}

The command reads every annotation and decodes every image. Errors would stop or spoil a training; warnings may be meant
so, and include every file that is not used. All of them go to a CSV file. DIR is written only where there is no error,
or, with --drop, without the images that have one. The same seed takes the same images.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from ..data import splits as operations
from ..data.findings import Findings
from ..data.formats import READERS, find_splits, read_annotations
from ..data.splits import MASKS, WHOLE, Split
from ..errors import InputError, prefix_errors
from ..files import is_empty, write_folder_atomically
from .common import parser


def print_counts(splits: Sequence[Split]) -> None:
    """Print a table: the images, and the objects of each class, split by split."""
    names = [{category['id']: category['name'] for category in split.coco['categories']} for split in splits]
    counts = [Counter(of.get(a['category_id']) for a in split.coco['annotations']) for split, of in zip(splits, names)]
    rows = [('', *(split.name for split in splits)), ('images', *(len(split.coco['images']) for split in splits))]
    rows += [
        (name, *(count[name] for count in counts)) for name in dict.fromkeys(n for of in names for n in of.values())
    ]
    width = max(len(row[0]) for row in rows)
    for name, *columns in rows:
        print(f'{name:{width}}' + ''.join(f'{column:>10}' for column in columns))


def parse_amount(text: str) -> float:
    """A number of images from 1 on, or a fraction below 1."""
    value = float(text)
    if not 0 < value < 1 and not (value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(f'{text}: give a number of images from 1 on, or a fraction below 1')
    return value


def report(splits: Sequence[Split], found: Findings, folder: Path, listing: Path) -> None:
    """Print what was found, write it to a file, and stop if there is an error in it."""
    print_counts(splits)
    found.print()
    if any(found.rows()):
        found.write(listing)
        print(f'\nall of them: {listing}')
    print()
    missing, total = operations.count_missing_masks(splits)
    advice = f'All are listed in {listing}; --drop --out DIR leaves the images that have one out'
    if missing:
        advice = (
            f'{missing} of {total} objects have a box but no mask: --masks from-boxes takes rectangles for masks, '
            f'--masks none leaves boxes alone (for xcit_spec_fasterrcnn), --drop leaves their images out. {advice}'
        )
    with prefix_errors(f'{folder}: not ready for training'):
        found.require_none(advice)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    formats = textwrap.fill(', '.join(READERS) + '.', 118, initial_indent='    ', subsequent_indent='    ')
    options = parser('prepare', __doc__.format(formats=formats))
    options.add_argument('folder', type=Path, help="in COCO's layout or another one; with --annotations, where the "
                         'images are')  # fmt: skip
    options.add_argument('--out', type=Path, metavar='DIR', help="a new folder to write, in COCO's layout")
    options.add_argument('--drop', action='store_true', help='leave images that have an error, or an object with one, '
                         'out of DIR')  # fmt: skip
    options.add_argument('--drop-objects', action='store_true', help='as --drop, but keep the other objects of an '
                         'image: what is left out becomes background')  # fmt: skip
    options.add_argument('--masks', choices=MASKS, help='of objects with a box alone: from-boxes takes the '
                         'rectangle for the mask; none removes all masks, for detectors that find boxes')  # fmt: skip
    options.add_argument('--zero-based', action='store_true', help="Pascal VOC's coordinates count from 0, not from 1")
    options.add_argument(
        '--subset', type=parse_amount, help='take this many images of each split, or a fraction below 1'
    )
    options.add_argument('--annotations', type=Path, metavar='FILE', help="one annotation file in COCO's format")
    options.add_argument('--val', type=parse_amount, help='how many images to use for validation, or a fraction '
                        '(default: 0.2)')  # fmt: skip
    options.add_argument('--seed', type=int, default=0, help='seed of the random choice of images')
    options.add_argument('--findings', type=Path, metavar='FILE', help='CSV file for all that is found (default: '
                        'work_dirs/prepare/FOLDER.csv)')  # fmt: skip
    args = options.parse_args(argv)
    args.drop |= args.drop_objects
    if not args.folder.is_dir() and not (args.folder.is_file() and args.folder.suffix.lower() == '.zip'):
        raise InputError(f'{args.folder}: no such folder and no .zip')
    if args.subset is not None and args.annotations is not None:
        raise InputError('--subset and --annotations cannot be combined')
    if (args.drop or args.subset or args.annotations or args.val or args.masks) and not args.out:
        raise InputError('--subset, --annotations, --val, --masks and --drop need --out DIR, the folder to write')
    if args.out and args.out.exists() and not is_empty(args.out):
        raise InputError(f'--out {args.out}: exists already; choose a new folder')
    args.findings = args.findings or Path('work_dirs/prepare') / f'{args.folder.resolve().stem}.csv'
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    beside = args.out.absolute().parent if args.out else None  # a place with room, and where hard links work
    with TemporaryDirectory(prefix='.prepare-', dir=beside if beside and beside.is_dir() else None) as scratch:
        prepare(args, Path(scratch))


def prepare(args: argparse.Namespace, scratch: Path) -> None:
    """Read, check and write the data set; ``scratch`` is a temporary folder."""
    found = Findings()
    if args.annotations:
        splits = [read_annotations(args.folder, args.annotations, found, scratch)]
    else:
        splits = find_splits(args.folder, found, scratch, args.zero_based)
    operations.set_masks(splits, args.masks)
    if args.subset:
        splits = [operations.draw_subset(split, args.subset, args.seed) for split in splits]
    digests = operations.check_splits(splits, found)
    if found.errors and args.drop:
        splits = operations.drop_faulty(splits, found, args.drop_objects)
    names = [split.name for split in splits]
    if args.val and 'val' in names:
        raise InputError(f'{args.folder}: has images for validation already; leave out --val')
    if not found.errors:
        if WHOLE in names or args.val:
            whole = WHOLE if WHOLE in names else 'train'
            if whole not in names:
                raise InputError(f'{args.folder}: has no images for training that --val could split; leave out --val')
            index = names.index(whole)
            splits[index : index + 1] = operations.split_off(splits[index], args.val or 0.2, args.seed)
        operations.compare_splits(splits, digests, found)
    report(splits, found, args.folder, args.findings)

    names = [split.name for split in splits]
    if 'val' not in names:
        raise InputError(
            f'{args.folder}: not ready for training: it lacks images for validation. '
            'Split some off: --val 0.2 --out DIR'
        )
    if args.out:
        with write_folder_atomically(args.out) as temporary:
            for split in splits:
                kept = split.images.name.startswith(split.name) and not split.is_part  # the name train2017
                operations.write_split(temporary, split.images.name if kept else split.name, split)
        print(f'wrote {args.out}')
    elif splits[0].is_foreign:
        print(f"in order, but training reads COCO's layout: spec-mmdet prepare {args.folder} --out DIR writes it")
        return
    if 'test' in names:
        print('the test split is neither trained on nor used by spec-mmdet test, which evaluates on val')
    if 'train' in names:
        print(f'ready for training: spec-mmdet train CONFIG --data {args.out or args.folder}')
    else:
        print(
            f'ready for spec-mmdet test --data {args.out or args.folder}; for training it lacks '
            'annotations/instances_train*.json'
        )
