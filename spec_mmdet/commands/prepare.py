"""Check, convert, split or subsample a data set, and write it in COCO's layout.

    spec-mmdet prepare FOLDER                         # check COCO's layout: instances, panoptic or both
    spec-mmdet prepare EXPORT --val 0.2 --out DIR     # convert an export
    spec-mmdet prepare FOLDER --drop --out DIR        # drop faulty images
    spec-mmdet prepare FOLDER --subset 0.1 --out DIR  # keep a tenth
    spec-mmdet prepare FOLDER --tiles 1024 --out DIR  # cut into tiles
    spec-mmdet prepare IMAGES --annotations FILE --val 0.2 --out DIR

EXPORT is a folder or a .zip in one of these formats:
    COCO (also of Roboflow, CVAT, Label Studio and FiftyOne), CVAT for images 1.1, Label Studio (JSON, JSON-MIN),
    YOLO (Ultralytics, Darknet, labelImg), Pascal VOC, LabelMe, label PNGs of semantic segmentation

The command reads every annotation and decodes every image. Errors would stop training or make its result useless.
Warnings may be intended; they include every unused file. All findings are written to a CSV file. DIR is
written only if there are no errors or, with --drop, without the faulty images. The same seed chooses the same images.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import InputError, prefix_errors
from ..files import is_empty, one_line_write_errors, write_folder_atomically
from .common import make_parser

if TYPE_CHECKING:  # imported after parsing: --help is fast
    from ..data.findings import Findings
    from ..data.splits import Split


def print_counts(splits: Sequence[Split]) -> None:
    """Print a table of the numbers of images and of objects of each class, by split."""
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
    """Parse a number of images from 1 on, or a fraction below 1."""
    with suppress(ValueError):
        value = float(text)
        if 0 < value < 1 or value >= 1 and value.is_integer():
            return value
    raise argparse.ArgumentTypeError(f'{text}: give a number of images from 1 on, or a fraction below 1')


def report(splits: Sequence[Split], found: Findings, folder: Path, listing: Path) -> None:
    """Print the findings, write them to a file, and raise InputError if there are errors."""
    from ..data.splits import count_missing_masks

    print_counts(splits)
    found.print()
    if any(found.list_rows()):
        found.write(listing)
        print(f'\nfull list: {listing}')
    print()
    missing, total = count_missing_masks(splits)
    advice = f'All errors are listed in {listing}. Pass --drop --out DIR to leave out the faulty images'
    if missing:
        advice = (
            f'{missing} of {total} objects have a box but no mask. Pass --masks from-boxes to use rectangles as masks, '
            f'--masks none to train on boxes (xcit_fasterrcnn), or --drop to leave out their images. {advice}'
        )
    with prefix_errors(f'{folder}: not ready for training'):
        found.require_none(advice)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = make_parser('prepare', __doc__)
    options.add_argument('folder', type=Path, help='folder or .zip file of the data set; with --annotations, the '
                         'folder of the images')  # fmt: skip
    options.add_argument(
        '--out', type=Path, metavar='DIR', help="new folder to write in COCO's layout (default: only check)"
    )
    options.add_argument('--drop', action='store_true', help='leave out of DIR the images with an error or a faulty '
                         'object')  # fmt: skip
    options.add_argument('--drop-objects', action='store_true', help='like --drop, but leave out only faulty '
                         'objects, which become background')  # fmt: skip
    options.add_argument('--masks', choices=['from-boxes', 'none'], help='from-boxes: use rectangles as '
                         'masks of objects with only a box; none: remove all masks, for box detectors (default: keep '
                         'masks)')  # fmt: skip
    options.add_argument(
        '--zero-based', action='store_true', help="Pascal VOC's coordinates start at 0 (default: at 1)"
    )
    options.add_argument(
        '--subset', type=parse_amount, help='number of images of each split, or a fraction below 1 (default: all)'
    )
    options.add_argument(
        '--annotations', type=Path, metavar='FILE', help="annotation file in COCO's format, if it is not in FOLDER"
    )
    options.add_argument('--val', type=parse_amount, help='number of images for validation, or a fraction below 1 '
                        '(default: 0.2 if there is no split)')  # fmt: skip
    options.add_argument('--tiles', type=int, metavar='SIZE', help='cut images and objects into tiles of at most SIZE '
                         'x SIZE pixels')  # fmt: skip
    options.add_argument('--overlap', type=int, metavar='N', help='minimum overlap of neighbouring tiles in pixels; '
                         'objects up to this size are intact in a tile (default: a quarter of SIZE)')  # fmt: skip
    options.add_argument('--seed', type=int, default=0, help='seed of the random choice of images (default: 0)')
    options.add_argument('--findings', type=Path, metavar='FILE', help='CSV file for all findings (default: '
                        'work_dirs/prepare/FOLDER.csv)')  # fmt: skip
    args = options.parse_args(argv)
    args.drop |= args.drop_objects
    if not args.folder.is_dir() and not (args.folder.is_file() and args.folder.suffix.lower() == '.zip'):
        raise InputError(f'{args.folder}: no such folder or .zip file. Check the path')
    if args.subset is not None and args.annotations is not None:
        raise InputError('--subset and --annotations cannot be combined. Run the command twice, --annotations first')
    if (args.drop or args.subset or args.annotations or args.val or args.masks or args.tiles) and not args.out:
        raise InputError('--subset, --annotations, --val, --masks, --tiles and --drop need --out DIR. Add it')
    if args.overlap is not None and args.tiles is None:
        raise InputError('--overlap belongs to --tiles. Add --tiles SIZE, or leave out --overlap')
    if args.tiles is not None:
        args.overlap = args.tiles // 4 if args.overlap is None else args.overlap
        if args.tiles < 32 or not 0 <= args.overlap < args.tiles:
            raise InputError(f'--tiles {args.tiles} --overlap {args.overlap}: SIZE must be at least 32, and N from 0 '
                             'to below SIZE')  # fmt: skip
    if args.out and args.out.exists() and not is_empty(args.out):
        raise InputError(f'--out {args.out}: exists already. Pass a new folder')
    args.findings = args.findings or Path('work_dirs/prepare') / f'{args.folder.resolve().stem}.csv'
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    beside = args.out.absolute().parent if args.out else None  # the same file system, for space and hard links
    beside = beside if beside and beside.is_dir() else None
    with one_line_write_errors(args.out or Path(gettempdir()), beside or Path(gettempdir())):
        scratch = TemporaryDirectory(prefix='.prepare-', dir=beside)
    with scratch:
        prepare(args, Path(scratch.name))


def prepare_maps(args: argparse.Namespace, task: ModuleType, listing: Path) -> None:
    """Prepare a folder of label PNGs for a task, and write the findings to ``listing``."""
    from ..data.findings import Findings

    found = Findings()
    if args.subset or args.val or args.masks or args.tiles:
        raise InputError('--subset, --val, --masks and --tiles do not apply to label PNGs. Leave them out')
    try:
        counts = task.prepare(args.folder, args.out, args.drop, found)
    finally:
        found.print()
        if any(found.list_rows()):
            found.write(listing)
            print(f'\nfull list: {listing}')
    print(', '.join(f'{split}: {count} images with label PNGs' for split, count in counts.items()))
    if args.out:
        print(f'wrote {args.out}')
    print(f'ready: spec-mmdet train {task.EXAMPLE} --data {args.out or args.folder}')


def prepare(args: argparse.Namespace, scratch: Path) -> None:
    """Read, check and write the data set; ``scratch`` is a temporary folder."""
    from ..data import splits as operations
    from ..data.findings import Findings
    from ..data.formats import find_splits, read_annotations
    from ..data.tasks import find_preparing_task
    from ..data.tiles import write_tiles

    if not args.annotations and (task := find_preparing_task(args.folder)):
        prepare_maps(args, task, args.findings)
        return
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
        raise InputError(f'{args.folder}: has images for validation already. Leave out --val')
    if not found.errors:
        if operations.WHOLE in names or args.val:
            whole = operations.WHOLE if operations.WHOLE in names else 'train'
            if whole not in names:
                raise InputError(f'{args.folder}: has no images for training that --val could split. Leave out --val')
            index = names.index(whole)
            splits[index : index + 1] = operations.split_off(splits[index], args.val or 0.2, args.seed)
        operations.compare_splits(splits, digests, found)
    report(splits, found, args.folder, args.findings)

    names = [split.name for split in splits]
    if 'val' not in names:
        raise InputError(
            f'{args.folder}: not ready for training: it lacks images for validation. '
            'Pass --val 0.2 --out DIR to split some off'
        )
    if args.out:
        with write_folder_atomically(args.out) as temporary:
            for split in splits:
                kept = split.images.name.startswith(split.name) and not split.is_part  # the name train2017
                name = split.images.name if kept else split.name
                if args.tiles:
                    write_tiles(temporary, name, split, args.tiles, args.overlap)
                else:
                    operations.write_split(temporary, name, split)
        print(f'wrote {args.out}')
    elif splits[0].is_foreign:
        print(f"no errors. To train, write the data in COCO's layout: spec-mmdet prepare {args.folder} --out DIR")
        return
    if 'test' in names:
        print('the split "test" is not used for training; the command "spec-mmdet test" evaluates on the split "val"')
    if 'train' in names:
        print(f'ready for training: spec-mmdet train CONFIG --data {args.out or args.folder}')
    else:
        print(
            f'ready for evaluation: spec-mmdet test --data {args.out or args.folder} (training also needs '
            'annotations/instances_train*.json)'
        )
    if not args.annotations and (task := find_preparing_task(args.folder, with_boxes=True)):
        if args.out:
            print(f'the label PNGs of {args.folder} are not written')
        else:
            prepare_maps(args, task, args.findings.with_stem(f'{args.findings.stem}_labels'))
