"""Image folders by class, for classifiers: timm's augmentation and sampling on torchvision's reader.

Needs timm, and is imported by the configs that pretrain alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torchvision.datasets import ImageFolder

from ..errors import InputError, list_briefly
from .checks import LOOKED_AT
from .images import read

SPLITS = ('train', 'val')


def posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    """Posterize by timm to at least 1 bit: at its greatest magnitude it asks for 0, which Pillow 12 rejects."""
    return auto_augment.posterize(image, max(bits, 1), **kwargs)


def build_transform(**arguments: object) -> Callable:
    """Build timm's transform by its create_transform, with our :func:`posterize`."""
    transform = create_transform(**arguments)
    for step in transform.transforms:
        for operation in [*getattr(step, 'ops', ()), *chain.from_iterable(getattr(step, 'policy', ()))]:
            if getattr(operation, 'aug_fn', None) is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def read_rgb(path: str) -> Image.Image:
    """Read an image as Pillow's, in RGB.

    Raises:
        InputError: naming the file, where it cannot be decoded to its end.
    """
    try:
        return Image.fromarray(np.ascontiguousarray(read(Path(path))[..., ::-1]))
    except InputError as error:
        raise InputError(f'{path}: {error}') from error


@DATASETS.register_module()
class ClassFolder(ImageFolder):
    """Images in folders named after their classes, as in ImageNet.

    Args:
        root: the folder of those folders.
        transform: arguments of timm's create_transform, which also normalises by ImageNet's mean and deviation.

    Raises:
        InputError: if there are none, or one is empty.
    """

    def __init__(self, root: str, transform: dict) -> None:
        try:
            super().__init__(root, build_transform(**transform), loader=read_rgb)
        except OSError as error:
            raise InputError(
                f'{root}: {error}; --data FOLDER takes FOLDER/train/CLASS/ and FOLDER/val/CLASS/, with images of the '
                'class that the folder is named for'
            ) from error
        self.metainfo = dict(classes=tuple(self.classes))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return an image, float32, shape (3, H, W), under 'inputs', and the index of its class under 'targets'."""
        image, target = super().__getitem__(index)
        return dict(inputs=image, targets=target)


@DATA_SAMPLERS.register_module()
class RepeatedAugmentation(RepeatAugSampler):
    """timm's sampler, in which an image comes several times to an epoch of as many samples (arXiv 1901.09335).

    Args:
        dataset: what is sampled.
        repeats: how often an image comes.
        seed: of the order; timm's own has the same one in every run.
    """

    def __init__(self, dataset: ImageFolder, repeats: int = 3, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=get_world_size(), rank=get_rank(), num_repeats=repeats)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Order the images by the seed and the epoch."""
        super().set_epoch(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))


def use_class_folders(cfg: Config, folder: Path) -> None:
    """Point a config at FOLDER/train and FOLDER/val; changes ``cfg``.

    Raises:
        InputError: if one of them is not there.
    """
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise InputError(f'--data {folder}: lacks the folder {split}/ of folders of images named for their classes')
        cfg[f'{split}_dataloader'].dataset.root = str((folder / split).absolute())


def check_class_folders(cfg: Config, thorough: bool, processes: int = 1) -> list[str]:
    """Check the images that a config trains a classifier on.

    Args:
        cfg: the whole config.
        thorough: whether to decode :data:`LOOKED_AT` images of each split.
        processes: that train together.

    Returns:
        The classes.

    Raises:
        InputError: if the splits have different classes, or a single one, images cannot be read, or they are fewer
            than a batch.
    """
    splits = {split: DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in SPLITS}
    train, val = (splits[split] for split in SPLITS)
    if differing := set(train.classes) ^ set(val.classes):
        raise InputError(
            f'classes that are in one of {train.root} and {val.root} alone: {list_briefly(sorted(differing))}'
        )
    if len(train.classes) < 2:
        raise InputError(f'{train.root}: all images are of one class, {train.classes[0]}: there is nothing to learn')
    batch = cfg.train_dataloader.batch_size
    if len(train) < batch * processes:
        raise InputError(f'{train.root}: its {len(train)} images are fewer than a batch of {batch * processes}')
    if batch % 2 and cfg.model.get('mixing'):
        raise InputError(f'train_dataloader.batch_size is {batch}: images are mixed in pairs, so it must be even')
    for dataset in splits.values() if thorough else ():
        faults = []
        for path, _ in dataset.samples[:: max(1, len(dataset) // LOOKED_AT)]:
            try:
                read(Path(path))
            except InputError as error:
                faults.append(f'{path} ({error})')
        if faults:
            raise InputError(
                f'images that cannot be read, of those looked at: {list_briefly(faults)}; --no-check goes on'
            )
    return train.classes
