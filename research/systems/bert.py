"""Train BERT to predict masked characters of the reference manual that every Python installation contains.

The text is that of pydoc's topics, in the order of their names, with white space normalised. Its last tenth is held
out. In a line 15 % of the characters are replaced by the mask and have to be predicted.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from .runs import IGNORED, System

MASK = 0  # NUL, which no text contains
CHARACTERS = 128  # ASCII; others are question marks


@cache
def read_text(held_out: bool) -> bytes:
    """Return the part of the text that is held out, or the part for training."""
    from pydoc_data.topics import topics

    words = ' '.join(topics[name] for name in sorted(topics)).split()
    whole = ' '.join(words).encode('ascii', 'replace')
    border = len(whole) * 9 // 10
    return whole[border:] if held_out else whole[:border]


@dataclass(frozen=True)
class Bert(System):
    """The BERT system; see the module."""

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    tests: int = 1000
    tokens: int = 16
    masked: float = 0.15
    layers: int = 2
    width: int = 64
    heads: int = 4

    examples = 'lines'

    def get_settings(self) -> dict[str, object]:
        # Versions of Python have different texts.
        return dict(
            super().get_settings(), text=zlib.crc32(read_text(held_out=True), zlib.crc32(read_text(held_out=False)))
        )

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        characters = torch.frombuffer(bytearray(read_text(held_out)), dtype=torch.uint8)
        starts = torch.randint(len(characters) - self.tokens + 1, (count, 1), generator=generator)
        lines = characters[starts + torch.arange(self.tokens)].long()
        masked = torch.rand(lines.shape, generator=generator) < self.masked
        return lines.masked_fill(masked, MASK), lines.masked_fill(~masked, IGNORED)

    def score_rules(self) -> dict[str, float]:
        _, targets = self.draw_held_out()
        asked = targets[targets != IGNORED]
        return {'always a space': (asked == ord(' ')).double().mean().item()}

    def build_model(self) -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=CHARACTERS,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            max_position_embeddings=self.tokens,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertForMaskedLM(config)

    def compute_logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).logits
