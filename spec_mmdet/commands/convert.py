"""Convert a checkpoint of XCiT in any known layout to SpecXCiT's, or back.

    spec-mmdet convert SOURCE DESTINATION [--fold | --condition svd] [...]

SOURCE is a classifier or backbone of the reference implementation (facebookresearch/xcit), DINO, timm or mmpretrain, a
detector of the reference, or a checkpoint of this project, plain or conditioned. DESTINATION (.pth or .safetensors) is
a backbone for `init_cfg=dict(type='Pretrained', checkpoint=DESTINATION)`, or with --detector a detector. It is written
only if every tensor of the source is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..status import show_status
from .common import make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('convert', __doc__)
    options.add_argument('source', help='file or URL')
    options.add_argument('destination', type=Path, help='file to write, .pth or .safetensors')
    options.add_argument(
        '--key', help='key of the weights in the file (default: the moving average or the teacher, if there is one)'
    )
    options.add_argument('--conditioning', choices=['identity', 'svd'], help='conditioning of the source, if '
                        'the file does not contain it')  # fmt: skip
    change = options.add_mutually_exclusive_group()
    change.add_argument('--fold', action='store_true', help='replace W by W + C, which gives a plain checkpoint')
    change.add_argument('--condition', choices=['identity', 'svd'], help='condition a plain checkpoint, keeping its '
                        'function: W is replaced by W - C')  # fmt: skip
    options.add_argument('--lam', type=float, help='lambda of an identity conditioning (default: see --sigmas)')
    options.add_argument('--sigmas', type=float, help='lambda of --condition identity as a multiple of sigma_max of '
                         'each projection (default: 2, if --lam is not given)')  # fmt: skip
    to = options.add_mutually_exclusive_group()
    to.add_argument('--to', choices=['reference', 'timm'], help='write the backbone in this layout (default: SpecXCiT)')
    to.add_argument('--detector', metavar='CONFIG', help='write a detector for this config (default: a backbone)')
    options.add_argument('--trust-pickle', action='store_true', help='run code that the source may contain, with '
                        'your permissions (default: reject such a file)')  # fmt: skip
    args = options.parse_args(argv)

    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from ..checkpoints import layouts
    from ..checkpoints.reading import describe_mismatches, fetch_file, get_classes, load
    from ..checkpoints.writing import describe_tensors, save_weights
    from ..conditioning import describe_conditioning
    from ..configs import find_config, read_config
    from ..data.fitting import set_classes
    from ..errors import InputError, prefix_errors
    from ..files import compute_digest

    MMLogger.get_current_instance().setLevel('ERROR')

    destination, name = args.destination, f'checkpoint {args.source}'
    if destination.suffix not in ('.pth', '.safetensors'):
        raise InputError(f'{destination}: the name must end in .pth or .safetensors')
    source = fetch_file(args.source)
    if destination.exists() and destination.samefile(source):
        raise InputError(f'{destination}: is the source. Pass another destination')
    if args.lam is not None and 'identity' not in (args.conditioning, args.condition):
        raise InputError('--lam needs --conditioning identity or --condition identity. Add one of them')
    if args.sigmas is not None and (args.condition != 'identity' or args.lam is not None):
        raise InputError('--sigmas needs --condition identity and excludes --lam. Change the options')
    if args.trust_pickle:
        os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)
    with show_status(f'reading {source.name}'):
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
            with show_status('conditioning'):
                backbone = layouts.condition(backbone, args.condition, args.lam, args.sigmas)
    weights, dropped = backbone, found.dropped + list(found.detector)
    if args.detector:
        weights = {f'backbone.{key}': value for key, value in backbone.items()} | found.detector
        dropped = found.dropped
        register_all_modules()
        cfg = read_config(find_config(args.detector))
        if classes:
            set_classes(cfg, classes)
        faults = describe_mismatches(MODELS.build(cfg.model), weights)
        if faults:
            raise InputError(f'{name} does not fit the detector of {args.detector}: {faults}. Pass its own config')
    elif args.to:
        weights = layouts.to_layout(backbone, args.to)
        dropped = dropped + [key for key in backbone if key.startswith('fpn') and key not in weights]
    print(describe_tensors('taken', list(weights)))
    print(describe_tensors('dropped', dropped))
    print(describe_tensors('missing', found.missing) + (', will be initialised' if found.missing else ''))

    conditioning = describe_conditioning(backbone)
    record = dict(
        source=args.source if '://' in args.source else source.name,
        sha256=compute_digest(source),
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
    with show_status(f'writing {destination.name}'):
        save_weights(weights, meta, 'model' if args.to == 'reference' else 'state_dict', destination)
    print(f'wrote {destination}: arch={found.arch!r}, patch_size={found.patch_size}, conditioning={conditioning}')
