"""Recognise the layouts of XCiT checkpoints, and translate them into SpecXCiT's names and back.

SpecXCiT's names are those of the reference implementation (facebookresearch/xcit). Each tensor of a checkpoint is
loaded, or listed as dropped, or causes an error.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..conditioning import Correction, describe_conditioning
from ..errors import InputError, list_briefly, prefix_errors
from ..models.classifier import SpecXCiTClassifier
from ..models.xcit import ARCHS, SpecXCiT
from .reading import find_nonfinite, is_state_dict

# Keys under which training scripts store weights. Averaged weights and teachers come first: the scripts evaluate these.
WRAPPERS = ('model_ema', 'state_dict_ema', 'teacher', 'state_dict', 'model', 'student')

# Patterns that translate the names of a layout into the reference's. The first pattern identifies the layout.
_PATTERNS = {
    'mmpretrain': (
        (r'^xca_layers\.', 'blocks.'),
        (r'^ca_layers\.', 'cls_attn_blocks.'),
        (r'^pos_embed\.token_projection\.conv\.', 'pos_embeder.token_projection.'),
        (r'^patch_embed\.proj\.(\d+)\.conv\.', lambda m: f'patch_embed.proj.{2 * int(m[1])}.0.'),
        (r'^patch_embed\.proj\.(\d+)\.bn\.', lambda m: f'patch_embed.proj.{2 * int(m[1])}.1.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
        (r'\.local_mp\.conv1\.bn\.', '.local_mp.bn.'),
        (r'\.local_mp\.(conv[12])\.conv\.', r'.local_mp.\1.'),
        (r'^head\.layers\.head\.', 'head.'),
        (r'^head\.fc\.', 'head.'),
    ),
    'timm': ((r'^pos_embed\.token_projection\.', 'pos_embeder.token_projection.'),),
    'reference': ((r'^pos_embeder\.token_projection\.', 'pos_embeder.token_projection.'),),
}

PYRAMID = ('fpn1', 'fpn2', 'fpn3', 'fpn4')  # a detector that reads fewer maps has fewer
CLASSIFIER = ('cls_token', 'cls_attn_blocks.', 'norm.', 'head.')  # unused by a detection backbone
_FIRST_BLOCK = re.compile(r'^(.*\.|)(?:xca_layers|blocks)\.0\.attn\.temperature$')
_PARAMETRIZED = re.compile(r'\.parametrizations\.weight\.(original|0\.lam|0\.sigmas|0\.C)$')
_CORRECTION = re.compile(r'^(?:(.*\.attn)\.correction|(.*)\.parametrizations\.weight\.0)\.(lam|sigmas|C)$')


@dataclass
class Checkpoint:
    """A checkpoint in SpecXCiT's names, and its original layout."""

    backbone: dict[str, Tensor]  # the state dict; complete, but without the levels of the pyramid that the file lacks
    layout: str  # 'reference', 'timm' or 'mmpretrain'
    wrapper: str  # the key of the weights; '' if there was none
    arch: str | dict  # a name in ARCHS, or dim, depth and num_heads
    patch_size: int
    classifier: dict[str, Tensor]  # class token, class attention, norm and head
    detector: dict[str, Tensor]  # the remaining weights of a detector, with their prefixes
    dropped: list[str]  # original names of the remaining tensors
    missing: list[str]  # names of the pyramid's tensors if the checkpoint has none; SpecXCiT initialises them

    @property
    def conditioning(self) -> str:
        """The conditioning of the weights, as configs write it."""
        return describe_conditioning(self.backbone)

    def __str__(self) -> str:
        return (
            f'{self.layout} layout, arch={self.arch!r}, patch_size={self.patch_size}, conditioning={self.conditioning}'
        )


def _unwrap(checkpoint: object, key: str | None) -> tuple[dict[str, Tensor], str]:
    """Return the state dict in a checkpoint, and its key."""
    if key is None and is_state_dict(checkpoint):
        return checkpoint, ''
    known = checkpoint if isinstance(checkpoint, dict) else {}
    for name in WRAPPERS if key is None else (key,):
        if is_state_dict(known.get(name)):
            return known[name], name
    found = list_briefly([f'{name!s:.40}' for name in known]) or 'nothing'
    raise InputError(
        f'contains no weights {"under " + repr(key) if key else "alone or under " + ", ".join(WRAPPERS)}. Its keys are '
        f'{found}. Select one with "spec-mmdet convert --key KEY"'
    )


def _strip(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str], bool]:
    """Remove the prefixes of wrappers, for instance of DDP, torch.compile, Lightning, or a teacher and a student.

    Returns:
        The weights of the XCiT, those around it, the names of those outside of both, and whether it is called backbone.
        Of several XCiTs, averaged weights come first, in the order of :data:`WRAPPERS`.
    """

    def rank(prefix: str) -> tuple:
        parts = prefix.split('.')
        return 'ema' not in prefix, *([part not in parts for part in WRAPPERS]), prefix

    prefix = min((m[1] for name in weights if (m := _FIRST_BLOCK.match(name))), key=rank, default='')
    outer = prefix.removesuffix('backbone.')
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    beside = {
        name.removeprefix(outer): value
        for name, value in weights.items()
        if name.startswith(outer) and not name.startswith(prefix)
    }
    return inside, beside, [name for name in weights if not name.startswith(outer)], outer != prefix


def _rename(weights: dict[str, Tensor], layout: str) -> dict[str, str]:
    """Map each name to the reference's; names of corrections to those of SpecXCiT's attention."""
    renamed = {}
    for name in weights:
        new = name
        for pattern, replacement in _PATTERNS[layout]:
            new = re.sub(pattern, replacement, new)
        record = _PARAMETRIZED.search(new)
        if record:
            layer = new[: record.start()]
            if record[1] == 'original':
                new = f'{layer}.weight'
            elif layer.endswith('.attn.qkv') and layer.startswith('blocks.'):
                new = f'{layer.removesuffix("qkv")}correction.{record[1].removeprefix("0.")}'
        renamed[name] = new
    if len(set(renamed.values())) < len(renamed):
        twice = next(new for new in renamed.values() if list(renamed.values()).count(new) > 1)
        raise InputError(f'contains two tensors for {twice}')
    return renamed


def _infer(weights: dict[str, Tensor]) -> tuple[str | dict, int]:
    """Infer the architecture, a name in ARCHS or a dict of dims, and the patch size from the shapes."""
    try:
        dim = weights['blocks.0.attn.proj.weight'].shape[0]
        num_heads = weights['blocks.0.attn.temperature'].shape[0]
    except (KeyError, IndexError) as error:
        raise InputError('lacks the attention of the first block, so it is not an XCiT') from error
    if not dim or not num_heads:
        raise InputError('its attention has no channels or no heads')
    blocks = {m[1] for m in (re.match(r'blocks\.(\d+)\.', name) for name in weights) if m}
    depth = len(blocks)
    if blocks != {str(i) for i in range(depth)}:
        raise InputError(f'its {depth} blocks are not numbered from 0 to {depth - 1}')
    convs = len({m[1] for m in (re.match(r'patch_embed\.proj\.(\d+)\.0\.weight$', name) for name in weights) if m})
    if convs not in (3, 4):
        raise InputError(f'its stem has {convs} convolutions instead of 3 (patch size 8) or 4 (patch size 16)')
    arch = dict(dim=dim, depth=depth, num_heads=num_heads)
    named = [name for name, known in ARCHS.items() if {k: known[k] for k in arch} == arch]
    return (named[0] if named else arch), 8 if convs == 3 else 16


@functools.lru_cache(maxsize=16)
def _own_shapes(dim: int, depth: int, num_heads: int, patch_size: int) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the state dicts of a SpecXCiT and of its classifier."""
    arch = dict(dim=dim, depth=depth, num_heads=num_heads)
    try:
        with torch.device('meta'):
            models = SpecXCiT(arch, patch_size), SpecXCiTClassifier(1, arch, patch_size=patch_size)
    except ValueError as error:
        raise InputError(f'its shapes are invalid for an XCiT: {error}') from error
    return [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]


def _groups(tensors: dict[str, Tensor], arch: str | dict, patch_size: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return names and shapes of an XCiT's tensors in groups; a checkpoint contains all of a group or nothing."""
    kind = ARCHS[arch] if isinstance(arch, str) else arch
    own, classifier = _own_shapes(kind['dim'], kind['depth'], kind['num_heads'], patch_size)
    dim, heads = kind['dim'], (kind['num_heads'],)
    classes = tensors['head.weight'].shape[:1] if 'head.weight' in tensors else ()
    classifier = {name: shape for name, shape in classifier.items() if name not in own and 'head' not in name}
    if 'cls_attn_blocks.0.attn.qkv.weight' not in tensors:  # as three layers
        classifier = {
            name.replace('.qkv.', f'.{role}.'): (shape[0] // 3, *shape[1:]) if '.qkv.' in name else shape
            for role in 'qkv'
            for name, shape in classifier.items()
        }

    # All layers have the same form of correction. That of class attention is dropped with the classifier.
    corrections = dict(correction={}, class_correction={})
    for group, weights in dict(
        correction={f'blocks.{i}.attn.correction.': (3 * dim, dim) for i in range(kind['depth'])},
        class_correction={
            re.sub(r'\.weight$', '.parametrizations.weight.0.', name): shape
            for name, shape in classifier.items()
            if re.search(r'\.attn\.(qkv|q|k|v)\.weight$', name)
        },
    ).items():
        kinds = {kind for kind in ('lam', 'sigmas', 'C') for layer in weights if f'{layer}{kind}' in tensors}
        relative = 'sigmas' in kinds
        per_head = any(tensors[f'{layer}lam'].ndim > relative for layer in weights if f'{layer}lam' in tensors)
        for layer, shape in weights.items():
            blocks = (shape[0] // dim,) if relative else ()  # a relative lambda has one entry per projection
            shapes = dict(lam=blocks + (heads if per_head else ()), sigmas=(), C=shape)
            corrections[group] |= {f'{layer}{kind}': shapes[kind] for kind in kinds}
    return dict(
        backbone={name: shape for name, shape in own.items() if not name.startswith('fpn')},
        **{level: {name: shape for name, shape in own.items() if name.startswith(f'{level}.')} for level in PYRAMID},
        **corrections,
        classifier=classifier,
        head={'head.weight': (*classes, dim), 'head.bias': (*classes,)},
    )


def _recognise(checkpoint: object, key: str | None) -> Checkpoint:
    weights, wrapper = _unwrap(checkpoint, key)
    inside, beside, outside, has_name = _strip(weights)
    layout = next((name for name, rules in _PATTERNS.items() if any(re.match(rules[0][0], n) for n in inside)), None)
    if layout is None:
        raise InputError(
            f'not a known layout of XCiT (reference, timm, mmpretrain); contains {list_briefly(list(inside))}'
        )
    head = {name: new for name, new in _rename(beside, layout).items() if new in ('head.weight', 'head.bias')}
    if len(head) == 2 and not head.keys() & inside.keys():  # mmpretrain's is beside the backbone
        inside |= {name: beside.pop(name) for name in head}
    names = _rename(inside, layout)
    original = {new: old for old, new in names.items()}
    tensors = {new: inside[old] for old, new in names.items()}
    arch, patch_size = _infer(tensors)
    groups = _groups(tensors, arch, patch_size)
    there = {group for group, shapes in groups.items() if group == 'backbone' or shapes.keys() & tensors.keys()}
    expected = {name: shape for group in groups if group in there for name, shape in groups[group].items()}

    # Only a detector's backbone has this name. The head of mmpretrain's classifiers is called head.
    detector = {n: v for n, v in beside.items() if has_name and not n.startswith('head.')}
    not_ours = [n for n in beside if n not in detector and not n.startswith('head.')]
    for what, faults in {
        'lacks': [n for n in expected if n not in tensors and not n.endswith('num_batches_tracked')],
        'has unknown tensors': [original[n] for n in tensors if n not in expected] + not_ours,
        'has inconsistent shapes': [
            f'{original[n]} {tuple(tensors[n].shape)} instead of {shape}'
            for n, shape in expected.items()
            if n in tensors and tuple(tensors[n].shape) != shape
        ],
        'contains NaN or inf': find_nonfinite(weights),
    }.items():
        if faults:
            raise InputError(
                f'{what}: {list_briefly(faults)} (read as {arch} with patch size {patch_size} in '
                f'the layout of {layout})'
            )
    taken = {n: v for n, v in tensors.items() if any(n in groups[g] for g in ('backbone', 'correction', *PYRAMID))}
    if ' and ' in describe_conditioning(taken):
        raise InputError(f'its blocks have different conditionings: {describe_conditioning(taken)}')
    classifier = {n: v for n, v in tensors.items() if n not in taken}
    dropped = [n for n in beside if n not in detector] + outside
    missing = [] if there & {*PYRAMID} else [name for level in PYRAMID for name in groups[level]]
    return Checkpoint(taken, layout, wrapper, arch, patch_size, classifier, detector, dropped, missing)


def recognise(checkpoint: object, name: str, key: str | None = None) -> Checkpoint:
    """Recognise a checkpoint's layout and architecture, and translate it into SpecXCiT's names.

    Known layouts:

    * classifiers and backbones of the reference implementation, timm and mmpretrain, plain or with a
      :class:`~spec_mmdet.conditioning.Correction` as parametrization of their projections;
    * teachers and students of DINO;
    * detectors and backbones of the reference and of this project.

    Args:
        checkpoint: the result of :func:`~spec_mmdet.checkpoints.reading.load`.
        name: its name in messages.
        key: the key of the weights; by default the first of :data:`WRAPPERS` that exists.

    Raises:
        InputError: if the layout is unknown, or tensors are missing, unknown, inconsistent in shape, or not finite.
    """
    with prefix_errors(name, 'Use a complete, intact XCiT of one of the supported layouts'):
        return _recognise(checkpoint, key)


def _blocks(weights: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix('.qkv.weight') for name in weights if name.endswith('.attn.qkv.weight')]


def _layer(correction: re.Match) -> str:
    return f'{correction[1]}.qkv' if correction[1] else correction[2]


def fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a plain XCiT with the same output: W + C instead of W, no corrections."""
    folded, states = dict(weights), defaultdict(dict)
    for name in weights:
        if record := _CORRECTION.match(name):
            states[_layer(record)][record[3]] = folded.pop(name)
    for layer, state in states.items():
        W = weights[f'{layer}.weight']
        folded[f'{layer}.weight'] = Correction.from_state(W, state, blocks=len(W) // W.shape[1])(W)
    return folded


def state_conditioning(backbone: dict[str, Tensor], type: str, lam: float | None) -> dict[str, Tensor]:
    """Add the correction to weights that were trained with it but saved without it.

    Raises:
        InputError: if the weights contain a correction already; for type 'svd', or without ``lam``, because neither C
            nor sigma_max of the initial weights can be computed from trained weights.
    """
    if describe_conditioning(backbone) != 'None':
        raise InputError(f'the weights contain {describe_conditioning(backbone)}. Leave out --conditioning')
    if type == 'svd' or lam is None:
        missing = 'the exact correction' if type == 'svd' else 'sigma_max of the initial weights'
        raise InputError(f'{missing} cannot be computed from trained weights. Pass --conditioning identity --lam LAM')
    stated = dict(backbone)
    for attn in _blocks(backbone):
        stated[f'{attn}.correction.lam'] = Correction(backbone[f'{attn}.qkv.weight'], type, lam).lam
    return stated


def condition(
    backbone: dict[str, Tensor], type: str, lam: float | None = None, sigmas: float | None = None
) -> dict[str, Tensor]:
    """Condition plain weights and keep their function: replace W by W - C and store the :class:`Correction`.

    Raises:
        InputError: if the weights are conditioned already.
    """
    if describe_conditioning(backbone) != 'None':
        raise InputError(f'conditioned already, with {describe_conditioning(backbone)}. Leave out --condition')
    conditioned = dict(backbone)
    for attn in _blocks(backbone):
        W = backbone[f'{attn}.qkv.weight']
        correction = Correction(W, type, lam, sigmas)
        conditioned[f'{attn}.qkv.weight'] = W - correction.make_C(W)
        conditioned |= {f'{attn}.correction.{name}': value for name, value in correction.state_dict().items()}
    return conditioned


def to_layout(weights: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Rename a SpecXCiT's or its classifier's state dict for the layout 'reference' or 'timm' (without fpn1 to fpn4).

    Corrections become parametrizations. Queries, keys and values of class attention are one layer in the reference and
    three in timm.

    Raises:
        InputError: if layers to be joined or split have corrections.
    """
    records = {name: record for name in weights if (record := _CORRECTION.match(name))}
    conditioned = {_layer(record) for record in records.values()}
    renamed = {}
    for name, value in weights.items():
        layer = name.removesuffix('.weight')
        if name in records:
            name = f'{_layer(records[name])}.parametrizations.weight.0.{records[name][3]}'
        elif layer in conditioned:
            name = f'{layer}.parametrizations.weight.original'
        elif layout == 'timm' and name.startswith('fpn'):
            continue
        renamed[name.replace('pos_embeder.', 'pos_embed.') if layout == 'timm' else name] = value
    joined, split = r'^(cls_attn_blocks\.\d+\.attn)\.qkv\.', r'^(cls_attn_blocks\.\d+\.attn)\.[qkv]\.'
    for name in [name for name in renamed if re.match(joined if layout == 'timm' else split, name)]:
        if '.parametrizations.' in name:
            raise InputError(f'class attention is conditioned, and layers differ in the layout of {layout}. Add --fold')
        if layout == 'timm':
            value = renamed.pop(name)
            renamed |= {name.replace('.qkv.', f'.{role}.'): part for role, part in zip('qkv', value.chunk(3))}
        elif '.q.' in name:
            parts = [renamed.pop(name.replace('.q.', f'.{role}.')) for role in 'qkv']
            renamed[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return renamed
