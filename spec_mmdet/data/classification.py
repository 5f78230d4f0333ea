"""Image folders by class for classifiers, with timm's augmentation and sampling.

Needs timm; only the configs for pretraining import this module.
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
from torchvision.datasets.folder import is_image_file

from ..errors import InputError, list_briefly
from .checks import LOOKED_AT
from .formats.export import is_junk
from .images import read

SPLITS = ('train', 'val')


def posterize(image: Image.Image, bits: int, **kwargs) -> Image.Image:
    """Posterize to at least 1 bit: timm's greatest magnitude means 0 bits, which Pillow 12 rejects."""
    return auto_augment.posterize(image, max(bits, 1), **kwargs)


def build_transform(**arguments: object) -> Callable:
    """Build timm's transform with our :func:`posterize`."""
    transform = create_transform(**arguments)
    for step in transform.transforms:
        for operation in [*getattr(step, 'ops', ()), *chain.from_iterable(getattr(step, 'policy', ()))]:
            if getattr(operation, 'aug_fn', None) is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def read_rgb(path: str) -> Image.Image:
    """Read an image as a Pillow image, RGB.

    Raises:
        InputError: naming the file, if it is corrupt or truncated.
    """
    try:
        return Image.fromarray(np.ascontiguousarray(read(Path(path))[..., ::-1]))
    except InputError as error:
        raise InputError(f'{path}: {error}') from error


def is_visible_image(path: str) -> bool:
    return is_image_file(path) and not is_junk(Path(path).name)


@DATASETS.register_module()
class ClassFolder(ImageFolder):
    """Images in folders named after their classes, as in ImageNet.

    Args:
        root: the parent folder.
        transform: arguments of timm's create_transform, which also normalises by ImageNet's mean and deviation.

    Raises:
        InputError: if there are no class folders, or one is empty.
    """

    def __init__(self, root: str, transform: dict) -> None:
        try:
            super().__init__(root, build_transform(**transform), loader=read_rgb, is_valid_file=is_visible_image)
        except OSError as error:
            raise InputError(
                f'{root}: {str(error).rstrip(".")}. --data FOLDER needs FOLDER/train/CLASS/ and FOLDER/val/CLASS/ with '
                'the images of each class'
            ) from error
        self.metainfo = dict(classes=tuple(self.classes))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Find the class folders; those of Jupyter, macOS and others are none."""
        names = [name for name in super().find_classes(directory)[0] if not is_junk(name)]
        return names, {name: index for index, name in enumerate(names)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return an image, float32, shape (3, H, W), under 'inputs', and the index of its class under 'targets'."""
        image, target = super().__getitem__(index)
        return dict(inputs=image, targets=target)


@DATA_SAMPLERS.register_module()
class RepeatedAugmentation(RepeatAugSampler):
    """timm's sampler for repeated augmentation (arXiv 1901.09335): an epoch contains fewer images, each several times.

    Args:
        dataset: the data set.
        repeats: how often an epoch contains an image.
        seed: seed of the order; timm's own order is the same in every run.
    """

    def __init__(self, dataset: ImageFolder, repeats: int = 3, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=get_world_size(), rank=get_rank(), num_repeats=repeats)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Seed the order of the images with seed and epoch."""
        super().set_epoch(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))


def use_class_folders(cfg: Config, folder: Path) -> None:
    """Point a config at FOLDER/train and FOLDER/val; changes ``cfg``.

    Raises:
        InputError: if a folder is missing.
    """
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise InputError(f'--data {folder}: lacks the folder {split}/ with a folder of images for each class')
        cfg[f'{split}_dataloader'].dataset.root = str((folder / split).absolute())


def check_class_folders(cfg: Config, thorough: bool, processes: int = 1) -> list[str]:
    """Check the images for training a classifier.

    Args:
        cfg: the complete config.
        thorough: whether to decode :data:`LOOKED_AT` images of each split.
        processes: number of training processes.

    Returns:
        The classes.

    Raises:
        InputError: if the splits have different classes or a single one, an image cannot be read, or there are fewer
            images than a batch needs.
    """
    splits = {split: DATASETS.build(cfg[f'{split}_dataloader'].dataset) for split in SPLITS}
    train, val = (splits[split] for split in SPLITS)
    if differing := set(train.classes) ^ set(val.classes):
        raise InputError(
            f'{train.root} and {val.root} have different classes: {list_briefly(sorted(differing))}. Add the missing '
            'folders'
        )
    if len(train.classes) < 2:
        raise InputError(f'{train.root}: contains only the class {train.classes[0]}. Add a folder of another class')
    batch = cfg.train_dataloader.batch_size
    if len(train) < batch * processes:
        raise InputError(
            f'{train.root}: contains {len(train)} images, fewer than the total batch size of {batch * processes}. '
            'Reduce train_dataloader.batch_size'
        )
    if batch % 2 and cfg.model.get('mixing'):
        raise InputError(
            f'train_dataloader.batch_size is {batch}. Use an even number, because images are mixed in pairs'
        )
    for dataset in splits.values() if thorough else ():
        if hidden := [path.name for path in Path(dataset.root).iterdir() if is_junk(path.name)]:
            print(f'{dataset.root}: skipped hidden files and folders: {list_briefly(hidden)}')
        faults, doubts = [], {}
        for path, _ in dataset.samples[:: max(1, len(dataset) // LOOKED_AT)]:
            try:
                read(Path(path), doubts)
            except InputError as error:
                faults.append(f'{path} ({error})')
        if faults:
            raise InputError(
                f'unreadable images: {list_briefly(faults)}. Replace them, or pass --no-check to skip this check'
            )
        for kind, paths in doubts.items():
            print(f'warning: {len(paths)} {kind}; first: {paths[0]}')
    return train.classes
