"""Text by BERT: masked characters of Python's own reference manual, which every installation of Python has.

The text is that of pydoc's topics, in the order of their names, with runs of white space as one space; its last tenth
is held out. Of a line's characters 15 % are masked, all by the mask, and asked for.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from .runs import NOT_ASKED, System

MASK = 0  # NUL, which is in no text
CHARACTERS = 128  # ASCII; others are question marks


@cache
def text(held_out: bool) -> bytes:
    """The part of the text that is held out, or the one that is not."""
    from pydoc_data.topics import topics

    words = ' '.join(topics[name] for name in sorted(topics)).split()
    whole = ' '.join(words).encode('ascii', 'replace')
    border = len(whole) * 9 // 10
    return whole[border:] if held_out else whole[:border]


@dataclass(frozen=True)
class Bert(System):
    """See the module."""

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

    def settings(self) -> dict[str, object]:
        # Of another Python it is another text.
        return dict(super().settings(), text=zlib.crc32(text(held_out=True), zlib.crc32(text(held_out=False))))

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        characters = torch.frombuffer(bytearray(text(held_out)), dtype=torch.uint8)
        starts = torch.randint(len(characters) - self.tokens + 1, (count, 1), generator=generator)
        lines = characters[starts + torch.arange(self.tokens)].long()
        masked = torch.rand(lines.shape, generator=generator) < self.masked
        return lines.masked_fill(masked, MASK), lines.masked_fill(~masked, NOT_ASKED)

    def rules(self) -> dict[str, float]:
        _, targets = self.held_out()
        asked = targets[targets != NOT_ASKED]
        return {'always a space': (asked == ord(' ')).double().mean().item()}

    def model(self) -> nn.Module:
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

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs).logits
