"""Convert checkpoints of XCiT between layouts and conditionings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..conditioning import describe_conditioning
from ..errors import InputError, prefix_errors
from ..files import compute_digest
from . import layouts
from .reading import describe_mismatches, fetch_file, get_classes, load
from .writing import save_weights


@dataclass
class Source:
    """A checkpoint to convert.

    Attributes:
        name: the file or URL.
        path: the local file.
        content: its weights in SpecXCiT's names.
        classes: the classes of a detector; None if the file does not contain them.
    """

    name: str
    path: Path
    content: layouts.Checkpoint
    classes: list[str] | None


def read_source(name: str, destination: Path, key: str | None = None, trust_pickle: bool = False) -> Source:
    """Read and recognise a checkpoint, for writing it to ``destination``.

    Args:
        name: file or URL.
        destination: the file to write, .pth or .safetensors.
        key: key of the weights in the file; by default the moving average or the teacher, if there is one.
        trust_pickle: see :func:`~.reading.load`.

    Raises:
        InputError: if the checkpoint is not an XCiT, or the destination has another suffix or is the source.
    """
    if destination.suffix not in ('.pth', '.safetensors'):
        raise InputError(f'{destination}: the name must end in .pth or .safetensors')
    path = fetch_file(name)
    if destination.exists() and destination.samefile(path):
        raise InputError(f'{destination}: is the source. Pass another destination')
    loaded = load(path, mmap=True, trust_pickle=trust_pickle)
    return Source(name, path, layouts.recognise(loaded, f'checkpoint {name}', key), get_classes(loaded))


def convert(
    source: Source,
    destination: Path,
    conditioning: str | None = None,
    fold: bool = False,
    condition: str | None = None,
    lam: float | None = None,
    sigmas: float | None = None,
    layout: str | None = None,
    detector: nn.Module | None = None,
) -> tuple[list[str], list[str], str]:
    """Write a checkpoint as a backbone, or as a detector if one is given. With ``layout``, a classifier stays complete.

    Args:
        source: the checkpoint.
        destination: the file to write.
        conditioning: 'identity' or 'svd', for a conditioned checkpoint that does not contain its conditioning.
        fold: replace W by W + C.
        condition: 'identity' or 'svd': replace W by W - C, for a model that adds C.
        lam: lambda of 'identity'.
        sigmas: lambda of ``condition='identity'`` as a multiple of sigma_max of each projection.
        layout: 'reference' or 'timm'; by default SpecXCiT's.
        detector: the model that must accept the weights.

    Returns:
        The names of the written tensors, those of the dropped ones, and the conditioning.

    Raises:
        InputError: if the weights do not fit the detector, or their conditioning cannot be changed.
    """
    found, name = source.content, f'checkpoint {source.name}'
    backbone, classifier = found.backbone, found.classifier
    with prefix_errors(name):
        if conditioning:
            backbone = layouts.state_conditioning(backbone, conditioning, lam)
        if fold:
            backbone, classifier = layouts.fold(backbone), layouts.fold(classifier)
        if condition:
            backbone = layouts.condition(backbone, condition, lam, sigmas)
    if detector is not None:
        weights = {f'backbone.{key}': value for key, value in backbone.items()} | found.detector
        if faults := describe_mismatches(detector, weights):
            raise InputError(f'{name} does not fit the detector: {faults}. Pass its own config')
        dropped = [*found.dropped, *classifier]
    elif layout:
        with prefix_errors(name):
            weights = layouts.to_layout(backbone | classifier, layout)
        unused = [key for key in backbone if key.startswith('fpn') and key not in weights]
        dropped = [*found.dropped, *found.detector, *unused]
    else:
        weights, dropped = backbone, [*found.dropped, *found.detector, *classifier]
    result = describe_conditioning(backbone)
    record = dict(
        source=source.name if '://' in source.name else source.path.name,
        sha256=compute_digest(source.path),
        layout=found.layout,
        key=found.wrapper,
        arch=json.dumps(found.arch),
        patch_size=str(found.patch_size),
        source_conditioning=found.conditioning,
        conditioning=result,
    )
    meta = dict(converted=record)
    if detector is not None and source.classes:
        meta['dataset_meta'] = dict(classes=source.classes)
    save_weights(weights, meta, 'model' if layout == 'reference' else 'state_dict', destination)
    return list(weights), dropped, result
