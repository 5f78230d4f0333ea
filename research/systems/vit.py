"""Train a Vision Transformer to classify images: which two textures they contain, and on which side.

A picture is divided by an upright edge. Each side has a grating in one of four directions, of random phase, width of
stripes and contrast, in noise: sixteen classes. No pixel shows a direction, and no patch shows both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .runs import System

DIRECTIONS = 4


def draw_gratings(direction: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw gratings of the directions 0, 45, 90 and 135 degrees: shape (n, size, size), values from -1 to 1."""
    angle = (direction * math.pi / DIRECTIONS)[:, None, None]
    period = 3 + 3 * torch.rand(len(direction), 1, 1, generator=generator)  # in pixels
    phase, contrast = torch.rand(2, len(direction), 1, 1, generator=generator)
    along = torch.arange(size) * angle.cos() + torch.arange(size)[:, None] * angle.sin()
    return (0.5 + 0.5 * contrast) * (2 * math.pi * (along / period + phase)).sin()


@dataclass(frozen=True)
class ViT(System):
    """The ViT system; see the module. ``noise`` is the standard deviation of the Gaussian noise."""

    steps: int = 500
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    tests: int = 2000
    tokens: int = 37
    size: int = 24
    patch: int = 4
    noise: float = 0.7
    layers: int = 3
    width: int = 64
    heads: int = 4

    needs = 'timm'
    examples = 'images'

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        left, right = torch.randint(DIRECTIONS, (2, count), generator=generator)
        edge = torch.randint(self.size // 3, 2 * self.size // 3 + 1, (count, 1, 1), generator=generator)
        sides = (draw_gratings(direction, self.size, generator) for direction in (left, right))
        images = torch.where(torch.arange(self.size) < edge, *sides)
        images = images + self.noise * torch.randn(images.shape, generator=generator)
        return images[:, None], DIRECTIONS * left + right

    def score_rules(self) -> dict[str, float]:
        return {'chance': 1 / DIRECTIONS**2}

    def build_model(self) -> nn.Module:
        from timm.models import VisionTransformer

        return VisionTransformer(
            img_size=self.size,
            patch_size=self.patch,
            in_chans=1,
            num_classes=DIRECTIONS**2,
            embed_dim=self.width,
            depth=self.layers,
            num_heads=self.heads,
        )

    def compute_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs)
