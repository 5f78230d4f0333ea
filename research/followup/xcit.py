"""Train a small XCiT to classify generated pictures of single objects: those of the experiment's pretraining.

The pictures of a step are drawn with replacement and changed at random: a crop of 60 to 100 % of the area, resized, and
mirrored. The held-out pictures are other drawings, and are not changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from research.scenes import Figures, make_crop
from research.systems.runs import System
from spec_mmdet.files import write_atomically

CACHE = Path('work_dirs/followup')
STREAM = 101  # of the pictures' random numbers, apart from those of the first experiment


@cache
def load_pictures(count: int, size: int, split: str) -> tuple[Tensor, Tensor]:
    """Draw pictures, or read those that an earlier run has drawn.

    Returns:
        Pictures, uint8, shape (count, 3, size, size), and their classes, shape (count,).
    """
    path = CACHE / f'{split}_{count}_{size}.npy'
    source = Figures()
    classes = torch.arange(count) % len(source.pretraining)
    if not path.is_file():
        rng = np.random.default_rng([STREAM, ('train', 'val').index(split)])
        drawn = np.stack([make_crop(rng, size, source, source.pretraining[i], split) for i in classes.tolist()])
        with write_atomically(path) as temporary, temporary.open('wb') as file:
            np.save(file, drawn.transpose(0, 3, 1, 2))
    return torch.from_numpy(np.load(path)), classes


@dataclass(frozen=True)
class XCiT(System):
    """The XCiT system; see the module. ``steps`` is ten epochs of ``pictures``."""

    steps: int = 940
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    tests: int = 10_000
    tokens: int = 36
    pictures: int = 6000
    size: int = 48
    patch: int = 8
    layers: int = 6
    width: int = 96
    heads: int = 4
    clip: float = 5.0

    needs = 'timm'
    examples = 'pictures'

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        pictures, classes = load_pictures(*((self.tests, self.size, 'val') if held_out else
                                            (self.pictures, self.size, 'train')))  # fmt: skip
        if held_out:
            return (pictures[:count].float() - 127.5) / 64, classes[:count]
        chosen = torch.randint(len(pictures), (count,), generator=generator)
        side = (0.6 + 0.4 * torch.rand(count, generator=generator)).sqrt()
        mirrored = 1 - 2 * torch.randint(2, (2, count), generator=generator)
        centre = (1 - side) * (2 * torch.rand(2, count, generator=generator) - 1)
        theta = torch.zeros(count, 2, 3)
        theta[:, 0, 0], theta[:, 1, 1] = side * mirrored
        theta[:, :, 2] = centre.T
        inputs = (pictures[chosen].float() - 127.5) / 64
        grid = affine_grid(theta, list(inputs.shape), align_corners=False)
        return grid_sample(inputs, grid, padding_mode='reflection', align_corners=False), classes[chosen]

    def score_rules(self) -> dict[str, float]:
        return {'chance': 1 / len(Figures().pretraining)}

    def build_model(self) -> nn.Module:
        from spec_mmdet.models.classifier import SpecXCiTClassifier

        return SpecXCiTClassifier(
            len(Figures().pretraining),
            arch=dict(dim=self.width, depth=self.layers, num_heads=self.heads),
            patch_size=self.patch,
            drop_path_rate=0.0,
        )

    def compute_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs)

    def clip_gradients(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), self.clip)
