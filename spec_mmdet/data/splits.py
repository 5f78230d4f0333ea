"""Split data sets, draw subsets, check them, drop faulty items, and write them in COCO's layout."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import InputError
from ..status import show_status
from .checks import check_annotations, check_contents, remove_faults
from .findings import Findings, Place
from .images import check_images

WHOLE = 'all'  # name of a data set that is not split yet


@dataclass
class Split:
    """An annotation file's content, and the folder of its images.

    Attributes:
        name: 'train', 'val' or 'test', or 'all' before splitting.
        coco: the COCO dict.
        title: its name in messages and findings.
        images: the folder that file names are relative to.
        ann_file: the file in COCO's format that training can read unchanged, if any.
        is_part: whether it was split off.
        is_foreign: whether it was converted from an export.
        incomplete: ids of images with unreadable objects.
    """

    name: str
    coco: dict
    title: str
    images: Path
    ann_file: Path | None = None
    is_part: bool = False
    is_foreign: bool = False
    incomplete: set = field(default_factory=set)


def count_images(total: int, amount: float) -> int:
    """Convert an amount, a number or a fraction below 1, to a number of images, at least one."""
    return min(total, max(1, round(amount * total if amount < 1 else amount)))


def keep_images(coco: dict, images: list[dict]) -> dict:
    """Return a COCO dict with only these images and their annotations."""
    left_out = {image['id'] for image in coco['images']} - {image['id'] for image in images}
    annotations = [annotation for annotation in coco['annotations'] if annotation['image_id'] not in left_out]
    return {**coco, 'images': images, 'annotations': annotations}


def draw_subset(split: Split, amount: float, seed: int) -> Split:
    """Keep a random number of images, or a fraction below 1, in their order."""
    images = split.coco['images']
    chosen = random.Random(seed).sample(range(len(images)), count_images(len(images), amount))
    return replace(split, coco=keep_images(split.coco, [images[i] for i in sorted(chosen)]))


def split_off(whole: Split, amount: float, seed: int) -> list[Split]:
    """Split into 'train' and 'val', with a number of images, or a fraction below 1, in 'val'.

    Raises:
        InputError: if no image would be left for training.
    """
    images = whole.coco['images']
    count = count_images(len(images), amount)
    chosen = draw_for_validation(whole.coco, count, seed)
    val, train = ([image for image in images if (image['id'] in chosen) == side] for side in (True, False))
    if not train:
        raise InputError(f'{whole.title}: has {len(val)} images, and --val leaves none for training. Use a lower --val')
    parts = dict(train=train, val=val)
    title = whole.title
    return [
        replace(whole, name=name, is_part=True, title=f'{title}, {name}', coco=keep_images(whole.coco, part))
        for name, part in parts.items()
    ]


def set_masks(splits: Sequence[Split], masks: str | None) -> None:
    """Change the objects' masks; changes ``splits``.

    Args:
        splits: all splits of a data set.
        masks: 'from-boxes' adds the rectangle of the box as mask where one is missing, 'none' removes all masks, None
            changes nothing.
    """
    for annotation in (annotation for split in splits for annotation in split.coco['annotations']):
        if masks == 'none':
            annotation.pop('segmentation', None)
        elif masks == 'from-boxes' and not annotation.get('segmentation') and len(annotation['bbox']) == 4:
            x, y, w, h = annotation['bbox']
            annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def count_missing_masks(splits: Sequence[Split]) -> tuple[int, int]:
    """Count the objects without a mask (0 if no object has one), and all objects."""
    have = [bool(annotation.get('segmentation')) for split in splits for annotation in split.coco['annotations']]
    return have.count(False) * any(have), len(have)


def check_splits(splits: Sequence[Split], found: Findings) -> dict[Path, bytes]:
    """Check every annotation and decode every image; return a digest of each intact image."""
    digests: dict[Path, bytes] = {}
    missing, _ = count_missing_masks(splits)
    for split in splits:
        check_annotations(split.coco, split.title, found, masks=True if missing else None)
        digests |= check_images(enumerate(split.coco['images']), split.images, split.title, found)
    return digests


def drop_faulty(splits: Sequence[Split], found: Findings, objects_only: bool = False) -> list[Split]:
    """Leave out faulty items, and report their errors as dropped.

    Args:
        splits: checked splits.
        found: their findings.
        objects_only: whether to drop only the faulty objects. By default their image is dropped, because the objects
            would become background.
    """
    sound = []
    for split in splits:
        if not objects_only:
            faulty = {split.coco['annotations'][i]['image_id'] for i in found.faulty_annotations[split.title]}
            faulty |= split.incomplete
            positions = (i for i, image in enumerate(split.coco['images']) if image['id'] in faulty)
            found.faulty_images[split.title].update(positions)
        sound.append(replace(split, coco=remove_faults(split.coco, split.title, found), incomplete=set()))
        images, annotations = (len(split.coco[key]) - len(sound[-1].coco[key]) for key in ('images', 'annotations'))
        print(f'left out of {split.title}: {images} images, {annotations} annotations')
    found.drop_errors()
    return sound


def compare_splits(splits: Sequence[Split], digests: dict[Path, bytes], found: Findings) -> None:
    """Check that the splits contain objects, and that no image for evaluation is also used for training."""
    trained_on = set()
    for split in splits:
        check_contents(split.coco, split.title, found, training=split.name == 'train')
        for image in split.coco['images']:
            digest = digests.get(split.images / image['file_name'])
            if split.name == 'train':
                trained_on.add(digest)
            elif digest and digest in trained_on:
                kind = f'{"validation" if split.name == "val" else "test"} images that also occur in the training split'
                found.warnings[kind].append(Place(split.title, image['file_name']))


@show_status('writing images and annotations')
def write_split(out: Path, name: str, split: Split) -> None:
    """Write a split in COCO's layout under a name; images are hard links if the file system supports them."""
    (out / 'annotations').mkdir(parents=True, exist_ok=True)
    for file_name in {image['file_name'] for image in split.coco['images']}:
        source, target = (split.images / file_name).resolve(), out / name / file_name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
    (out / 'annotations' / f'instances_{name}.json').write_text(json.dumps(split.coco))


def draw_for_validation(coco: dict, count: int, seed: int) -> set:
    """Choose random images for validation so that every class of at least two images is in both splits.

    For each class, the rarest first, we choose the image that adds most missing classes. The rest is drawn from all
    images. Images with the last object of a class stay in training as long as there are others.

    Args:
        coco: a COCO dict.
        count: number of images.
        seed: seed of the choice.

    Returns:
        Their ids.
    """
    classes: dict[object, set] = defaultdict(set)  # classes of each image
    for annotation in coco['annotations']:
        if not annotation.get('iscrowd'):
            classes[annotation['image_id']].add(annotation['category_id'])
    order = [image['id'] for image in coco['images']]
    random.Random(seed).shuffle(order)
    left = Counter(category for image in order for category in classes[image])  # images of each class, for training
    chosen: dict[object, None] = {}

    def can_be_spared(image: object) -> bool:
        return image not in chosen and all(left[category] > 1 for category in classes[image])

    def take(image: object) -> None:
        chosen[image] = None
        left.subtract(classes[image])

    covered: set = set()
    for category, _ in sorted(left.items(), key=lambda item: item[1]):
        if category in covered or len(chosen) == count:
            continue
        spare = [image for image in order if category in classes[image] and can_be_spared(image)]
        if spare:
            image = max(spare, key=lambda image: len(classes[image] - covered))
            take(image)
            covered |= classes[image]
    for spared in (True, False):
        for image in order:
            if len(chosen) < count and image not in chosen and (not spared or can_be_spared(image)):
                take(image)
    return set(chosen)
