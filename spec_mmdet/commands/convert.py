"""Convert a checkpoint of XCiT, in any layout there is, into one of SpecXCiT, or back.

    spec-mmdet convert SOURCE DESTINATION [--fold | --condition identity|svd] [...]

Read are classifiers and backbones of the reference implementation (facebookresearch/xcit), DINO, timm and mmpretrain,
detectors of the reference, and this project's own, plain or conditioned. What is written is a backbone for
`init_cfg=dict(type='Pretrained', checkpoint=DESTINATION)`, or a whole detector with --detector, as .pth or
.safetensors by its ending. It is written only if every tensor of the source is accounted for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from safetensors.torch import save as safetensors
from torch import Tensor

from ..checkpoints import layouts
from ..checkpoints.reading import describe_mismatches, get_classes, load, local_file
from ..conditioning import describe_conditioning
from ..configs import find_config
from ..data.fitting import set_classes
from ..errors import InputError, prefix_errors
from ..files import write
from ..training.saving import serialize
from .common import parser


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save(weights: dict[str, Tensor], meta: dict, key: str, destination: Path) -> None:
    """Write a checkpoint, whole or not at all."""
    if destination.suffix == '.safetensors':
        content = safetensors({name: value.contiguous() for name, value in weights.items()}, meta['converted'])
    else:
        content = serialize({key: weights, 'meta': meta})
    write(destination, content)


def line(title: str, names: list[str]) -> str:
    """How many tensors there are of each part."""
    parts = Counter(name.partition('.')[0] for name in names)
    return f'{title:11}{len(names):5}  {", ".join(f"{part} ({count})" for part, count in parts.items())}'


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('convert', __doc__)
    options.add_argument('source', help='a file, or an http(s) address')
    options.add_argument('destination', type=Path, help='a .pth or .safetensors file to write')
    options.add_argument(
        '--key', help=f'what the weights are under (default: the first of {", ".join(layouts.WRAPPERS)})'
    )
    options.add_argument('--conditioning', choices=['identity', 'svd'], help='what the source was made with, if it '
                        'does not say so itself')  # fmt: skip
    change = options.add_mutually_exclusive_group()
    change.add_argument('--fold', action='store_true', help='put W + C in the place of W: a plain checkpoint')
    change.add_argument('--condition', choices=['identity', 'svd'], help='condition a plain checkpoint, keeping its '
                        'function: W - C in the place of W')  # fmt: skip
    options.add_argument('--lam', type=float, help='lambda of --conditioning identity or --condition identity')
    options.add_argument('--sigmas', type=float, help='lambda of --condition identity as a multiple of sigma_max of '
                         'each projection (default: 2, if --lam is not given)')  # fmt: skip
    to = options.add_mutually_exclusive_group()
    to.add_argument('--to', choices=['reference', 'timm'], help='write the backbone in this layout')
    to.add_argument('--detector', metavar='CONFIG', help='write the whole detector, for this config')
    options.add_argument('--trust-pickle', action='store_true', help='run the code that the source may hold: it can do '
                        'whatever you can')  # fmt: skip
    args = options.parse_args(argv)
    MMLogger.get_current_instance().setLevel('ERROR')

    destination, name = args.destination, f'checkpoint {args.source}'
    if destination.suffix not in ('.pth', '.safetensors'):
        raise InputError(f'{destination}: the name must end in .pth or .safetensors')
    source = local_file(args.source)
    if destination.exists() and destination.samefile(source):
        raise InputError(f'{destination}: the source would be overwritten')
    if args.lam is not None and 'identity' not in (args.conditioning, args.condition):
        raise InputError('--lam belongs to --conditioning identity or --condition identity')
    if args.sigmas is not None and (args.condition != 'identity' or args.lam is not None):
        raise InputError('--sigmas belongs to --condition identity, without --lam')
    if args.trust_pickle:
        os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)
    loaded = load(source, mmap=True, trust_pickle=args.trust_pickle)
    found = layouts.recognise(loaded, name, args.key)
    classes = get_classes(loaded)
    print(f'recognised {found}' + (f', under {found.wrapper!r}' if found.wrapper else ''))

    backbone = found.backbone
    with prefix_errors(name):
        if args.conditioning:
            backbone = layouts.state_conditioning(backbone, args.conditioning, args.lam)
        if args.fold:
            backbone = layouts.fold(backbone)
        if args.condition:
            backbone = layouts.condition(backbone, args.condition, args.lam, args.sigmas)
    weights, dropped = backbone, found.dropped + list(found.detector)
    if args.detector:
        weights = {f'backbone.{key}': value for key, value in backbone.items()} | found.detector
        dropped = found.dropped
        register_all_modules()
        cfg = Config.fromfile(find_config(args.detector))
        if classes:
            set_classes(cfg, classes)
        faults = describe_mismatches(MODELS.build(cfg.model), weights)
        if faults:
            raise InputError(f'{name} is not the detector that {args.detector} configures: {faults}')
    elif args.to:
        weights = layouts.to_layout(backbone, args.to)
        dropped = dropped + [key for key in backbone if key.startswith('fpn') and key not in weights]
    print(line('taken', list(weights)))
    print(line('dropped', dropped))
    print(line('missing', found.missing) + (', which are initialised' if found.missing else ''))

    conditioning = describe_conditioning(backbone)
    record = dict(
        source=args.source if '://' in args.source else source.name,
        sha256=sha256(source),
        layout=found.layout,
        key=found.wrapper,
        arch=json.dumps(found.arch),
        patch_size=str(found.patch_size),
        source_conditioning=found.conditioning,
        conditioning=conditioning,
    )
    meta = dict(converted=record)
    if args.detector and classes:
        meta['dataset_meta'] = dict(classes=classes)
    save(weights, meta, 'model' if args.to == 'reference' else 'state_dict', destination)
    print(f'wrote {destination}: arch={found.arch!r}, patch_size={found.patch_size}, conditioning={conditioning}')
