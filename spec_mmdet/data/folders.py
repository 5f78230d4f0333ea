"""Find a data set's annotation file and images in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError

ROBOFLOW = '_annotations.coco.json'


def list_pairs(folder: Path, split: str, kind: str = 'instances') -> Iterator[tuple[Path, list[Path]]]:
    """Yield the annotation files of a split with the possible folders of its images.

    These are COCO's, CVAT's and Roboflow's: annotations/instances_train2017.json with train2017/, instances_Train.json
    with images/Train/, and train/_annotations.coco.json next to its images (a ``kind`` other than 'instances': COCO's).
    """
    for ann_file in sorted(folder.glob(f'annotations/{kind}_*.json')):
        name = ann_file.stem.removeprefix(f'{kind}_')
        if name.lower().startswith(split):
            yield ann_file, [folder / name, folder / 'images' / name]
    for name in (split, 'valid') if split == 'val' else (split,):
        if kind == 'instances' and (folder / name / ROBOFLOW).is_file():
            yield folder / name / ROBOFLOW, [folder / name]


def find_split(folder: Path, split: str, kind: str = 'instances') -> tuple[Path, Path] | None:
    """Find the annotation file and the image folder of a split.

    Args:
        folder: a folder in COCO's, CVAT's or Roboflow's layout, see :func:`list_pairs`.
        split: 'train', 'val' or 'test'; folders may be called train, train2017 or valid.
        kind: of the annotations, 'instances' or 'panoptic'.

    Returns:
        Both paths, or None if both are missing.

    Raises:
        InputError: if one of them is missing, or there are several pairs.
    """
    pairs = list(list_pairs(folder, split, kind))
    found = [
        (ann_file, next(filter(Path.is_dir, images))) for ann_file, images in pairs if any(map(Path.is_dir, images))
    ]
    if len(found) > 1:
        names = ', '.join(str(images.relative_to(folder)) for _, images in found)
        raise InputError(f'{folder}: contains several data sets for {split} ({names}). Keep one of them')
    if found:
        return found[0]
    if pairs:
        ann_file, images = pairs[0]
        raise InputError(f'{folder}: the images of annotations/{ann_file.name} are missing. Copy them to {images[0]}')
    for images in sorted(folder.glob(f'{split}*')):
        if images.is_dir():
            ann_file = folder / 'annotations' / f'{kind}_{images.name}.json'
            raise InputError(f'{folder}: {images.name} lacks its annotation file. Copy it to {ann_file}')
    return None
