"""Write checkpoints of weights, and describe what they contain."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..files import write


def serialize(content: object) -> bytes:
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_weights(weights: dict[str, Tensor], meta: dict, key: str, destination: Path) -> None:
    """Write a checkpoint atomically, as .pth with its weights under a key, or as .safetensors."""
    if destination.suffix == '.safetensors':
        content = save({name: value.contiguous() for name, value in weights.items()}, meta['converted'])
    else:
        content = serialize({key: weights, 'meta': meta})
    write(destination, content)


def describe_tensors(title: str, names: list[str]) -> str:
    """Return a line with the number of tensors of each part."""
    parts = Counter(name.partition('.')[0] for name in names)
    return f'{title:11}{len(names):5}  {", ".join(f"{part} ({count})" for part, count in parts.items())}'
