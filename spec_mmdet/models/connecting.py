"""Connect a SpecXCiT to the part of a detector that reads its feature maps, in the config of a model."""

from __future__ import annotations

from mmdet.models import CenterNetHead, DetDataPreprocessor
from mmdet.registry import MODELS

from ..configs import is_kind_of
from ..errors import InputError
from .classifier import SpecXCiTClassifier
from .xcit import ARCHS, STRIDES, SpecXCiT

# By the number of maps that a neck or head reads: what all of MMDetection's detectors with so many maps expect.
STRIDES_BY_COUNT = {1: STRIDES[3:], 3: STRIDES[1:], 4: STRIDES}


def find_reader(model: dict) -> tuple[str, dict]:
    """Find the part that reads the backbone's maps: the first neck, or else a head with a list of channels.

    Returns:
        Its name and its config.

    Raises:
        InputError: if there is none.
    """
    neck = model.get('neck')
    if isinstance(neck, (list, tuple)) and neck:
        return 'model.neck.0', neck[0]
    if neck:
        return 'model.neck', neck
    for key, head in model.items():
        if isinstance(head, dict) and isinstance(head.get('in_channels'), (list, tuple)):
            return f'model.{key}', head
    raise InputError(
        f'model.backbone: {model.get("type")} has neither a neck nor a head that reads several maps, so SpecXCiT '
        'cannot replace its backbone. Use a detector with a neck'
    )


def connect_backbone(model: dict) -> list[str]:
    """Fit the channels of the part that reads SpecXCiT's maps, and the maps to what it reads; changes ``model``.

    A part that reads one map gets stride 32, three maps 8, 16 and 32, four maps 4 to 32. Maps that it skips
    (``start_level``) are not made, because distributed training fails on parameters without a gradient. Images are
    padded to multiples of 32, without which upsampled maps do not fit the next ones.

    Args:
        model: a detector's config. It is unchanged if its backbone is no SpecXCiT, or a classifier.

    Returns:
        The settings that were changed, for instance "model.neck.in_channels=[384, 384, 384]".

    Raises:
        InputError: if the detector does not read maps of these strides.
    """
    backbone = model.get('backbone') or {}
    if not is_kind_of(backbone, MODELS, SpecXCiT) or is_kind_of(backbone, MODELS, SpecXCiTClassifier):
        return []
    name, reader = find_reader(model)
    channels = reader.get('in_channels')
    reads_one = not isinstance(channels, (list, tuple))
    channels = [channels] if reads_one else list(channels)
    count = len(channels)
    if any(str(key).endswith('backbone') for key in reader):
        raise InputError(f'{name}: {reader.get("type")} has a backbone of its own, which SpecXCiT cannot replace. Use '
                         'another neck, for instance FPN')  # fmt: skip
    strides = backbone.get('out_strides')
    if strides is None:
        if count not in STRIDES_BY_COUNT:
            raise InputError(
                f'{name}: {reader.get("type")} reads {count} maps, but SpecXCiT has maps for one (stride 32), three '
                '(8, 16, 32) or four (4, 8, 16, 32). Use a neck that reads as many'
            )
        strides = STRIDES_BY_COUNT[count]
    elif len(strides) != count:
        raise InputError(f'model.backbone.out_strides has {len(strides)} strides, but {name} reads {count} maps. Make '
                         f'{name}.in_channels as long as out_strides')  # fmt: skip
    arch = backbone.get('arch', 'small_12')
    arch = ARCHS.get(arch, {}) if isinstance(arch, str) else arch
    skipped = reader.get('start_level', 0)
    changes: dict[str, object] = {}
    if skipped and reader.get('end_level', -1) == -1 and 'out_indices' not in backbone:
        strides = strides[skipped:]
        changes[f'{name}.start_level'] = reader['start_level'] = 0
    if tuple(strides) != tuple(backbone.get('out_strides', STRIDES)):
        changes['model.backbone.out_strides'] = backbone['out_strides'] = tuple(strides)
    if 'dim' in arch and channels != [arch['dim']] * len(strides):
        fitting = arch['dim'] if reads_one else [arch['dim']] * len(strides)
        changes[f'{name}.in_channels'] = reader['in_channels'] = fitting
    if is_kind_of(model.get('bbox_head') or {}, MODELS, CenterNetHead) and not backbone.get('contiguous'):
        changes['model.backbone.contiguous'] = backbone['contiguous'] = True
    preprocessor = model.get('data_preprocessor') or {}
    divisor = preprocessor.get('pad_size_divisor', 1)
    if is_kind_of(preprocessor, MODELS, DetDataPreprocessor) and divisor % STRIDES[-1]:
        changes['model.data_preprocessor.pad_size_divisor'] = preprocessor['pad_size_divisor'] = STRIDES[-1]
    return [f'{key}={value}' for key, value in changes.items()]
