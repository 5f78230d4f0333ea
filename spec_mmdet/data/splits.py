"""Dividing a data set: images for validation, such that each class is on both sides where it can be."""

from __future__ import annotations

import random
from collections import Counter, defaultdict


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
