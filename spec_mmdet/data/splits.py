"""Splits of a data set: drawing, thinning out, checking, dropping what is faulty, and writing them in COCO's layout."""

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
from .checks import check_annotations, check_contents, remove_faults
from .findings import Findings, Place
from .images import check_images

WHOLE = 'all'  # the name of what is still to be split
MASKS = ('from-boxes', 'none')


@dataclass
class Split:
    """An annotation file's content, and the folder of its images.

    Attributes:
        name: 'train', 'val', 'test', or 'all' of what is still to be split.
        coco: the COCO dict.
        title: its name in messages and findings.
        images: the folder that file names are relative to.
        ann_file: the file in COCO's format that training reads as it is, if there is one.
        is_part: whether it was split off.
        incomplete: ids of images with objects that could not be read.
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
    """How many images an amount is: a number, or a fraction of all if it is below 1; at least one."""
    return min(total, max(1, round(amount * total if amount < 1 else amount)))


def keep_images(coco: dict, images: list[dict]) -> dict:
    """A COCO dict without its other images and their annotations; everything else in it is kept."""
    left_out = {image['id'] for image in coco['images']} - {image['id'] for image in images}
    annotations = [annotation for annotation in coco['annotations'] if annotation['image_id'] not in left_out]
    return {**coco, 'images': images, 'annotations': annotations}


def draw_subset(split: Split, amount: float, seed: int) -> Split:
    """Keep a number of images, or a fraction below 1, drawn at random but in their order."""
    images = split.coco['images']
    chosen = random.Random(seed).sample(range(len(images)), count_images(len(images), amount))
    return replace(split, coco=keep_images(split.coco, [images[i] for i in sorted(chosen)]))


def split_off(whole: Split, amount: float, seed: int) -> list[Split]:
    """Split into 'train' and 'val', of which the latter has a number of images, or a fraction below 1.

    Raises:
        InputError: if nothing would be left for training.
    """
    images = whole.coco['images']
    count = count_images(len(images), amount)
    chosen = draw_for_validation(whole.coco, count, seed)
    val, train = ([image for image in images if (image['id'] in chosen) == side] for side in (True, False))
    if not train:
        raise InputError(f'{whole.title}: has {len(val)} images, of which --val leaves none for training; use fewer')
    parts = dict(train=train, val=val)
    title = whole.title
    return [
        replace(whole, name=name, is_part=True, title=f'{title}, {name}', coco=keep_images(whole.coco, part))
        for name, part in parts.items()
    ]


def set_masks(splits: Sequence[Split], masks: str | None) -> None:
    """Change the objects' masks, in the splits themselves.

    Args:
        splits: all of a data set's.
        masks: 'from-boxes' gives objects without a mask the rectangle of their box, 'none' removes all masks; None
            leaves them as they are.
    """
    for annotation in (annotation for split in splits for annotation in split.coco['annotations']):
        if masks == 'none':
            annotation.pop('segmentation', None)
        elif masks == 'from-boxes' and not annotation.get('segmentation') and len(annotation['bbox']) == 4:
            x, y, w, h = annotation['bbox']
            annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def count_missing_masks(splits: Sequence[Split]) -> tuple[int, int]:
    """Count the objects without a mask, and all; the former are 0 where none has a mask."""
    have = [bool(annotation.get('segmentation')) for split in splits for annotation in split.coco['annotations']]
    return have.count(False) * any(have), len(have)


def check_splits(splits: Sequence[Split], found: Findings) -> dict[Path, bytes]:
    """Check every annotation and decode every image; returns a digest of each intact image."""
    digests: dict[Path, bytes] = {}
    missing, _ = count_missing_masks(splits)
    for split in splits:
        check_annotations(split.coco, split.title, found, masks=True if missing else None)
        digests |= check_images(enumerate(split.coco['images']), split.images, split.title, found)
    return digests


def drop_faulty(splits: Sequence[Split], found: Findings, objects_only: bool = False) -> list[Split]:
    """Leave out what has an error, and report its errors as dropped.

    Args:
        splits: checked ones.
        found: their errors.
        objects_only: whether an image keeps its other objects where one has an error. By default the image is left out,
            as the object would become background in it.
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
    """Check that there is something to train on and to evaluate on, and that the two have no image in common."""
    trained_on = set()
    for split in splits:
        check_contents(split.coco, split.title, found, training=split.name == 'train')
        for image in split.coco['images']:
            digest = digests.get(split.images / image['file_name'])
            if split.name == 'train':
                trained_on.add(digest)
            elif digest and digest in trained_on:
                kind = f'images for {"validation" if split.name == "val" else "testing"} that are trained on'
                found.warnings[kind].append(Place(split.title, image['file_name']))


def write_split(out: Path, name: str, split: Split) -> None:
    """Write a split in COCO's layout under a name, the images as hard links where the file system has them."""
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
    """Choose images for validation, at random but for this: every class that two images have is on both sides.

    Classes of few images come first, each with the image that brings most classes that validation still lacks; the
    rest is drawn from all images. None is taken that has the last object of a class, unless ``count`` asks for them.

    Args:
        coco: a COCO dict.
        count: how many images.
        seed: of the choice; the same seed chooses the same images.

    Returns:
        Their ids.
    """
    classes: dict[object, set] = defaultdict(set)  # of each image
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
