"""Convert a checkpoint of XCiT in any known layout to SpecXCiT's, or back.

    spec-mmdet convert SOURCE DESTINATION [--fold | --condition svd] [...]

SOURCE is a classifier or backbone of the reference implementation (facebookresearch/xcit), DINO, timm or mmpretrain, a
detector of the reference, or a checkpoint of this project, plain or conditioned. DESTINATION (.pth or .safetensors) is
a backbone for `init_cfg=dict(type='Pretrained', checkpoint=DESTINATION)`, with --detector a detector, or with --to a
backbone or classifier for other programs. It is written only if every tensor of the source is known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..status import show_status
from .common import make_parser, require_positive


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('convert', __doc__)
    options.needs = 'checkpoints.conversion'
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
    positive = require_positive(float)
    options.add_argument('--lam', type=positive, help='lambda of an identity conditioning (default: see --sigmas)')
    options.add_argument('--sigmas', type=positive, help='lambda of --condition identity as a multiple of sigma_max of '
                         'each projection (default: 2, if --lam is not given)')  # fmt: skip
    to = options.add_mutually_exclusive_group()
    to.add_argument('--to', choices=['reference', 'timm'], help='write the backbone or classifier in this layout '
                    '(default: the backbone in SpecXCiT\'s)')  # fmt: skip
    to.add_argument('--detector', metavar='CONFIG', help='write a detector for this config (default: a backbone)')
    options.add_argument('--trust-pickle', action='store_true', help='run code that the source may contain, with '
                        'your permissions (default: reject such a file)')  # fmt: skip
    args = options.parse_args(argv)

    if args.lam is not None and 'identity' not in (args.conditioning, args.condition):
        raise InputError('--lam needs --conditioning identity or --condition identity. Add one of them')
    if args.sigmas is not None and (args.condition != 'identity' or args.lam is not None):
        raise InputError('--sigmas needs --condition identity and excludes --lam. Change the options')
    if args.trust_pickle:
        os.environ.pop('TORCH_FORCE_WEIGHTS_ONLY_LOAD', None)

    from mmengine.logging import MMLogger

    from ..checkpoints.conversion import convert, read_source
    from ..checkpoints.writing import describe_tensors

    MMLogger.get_current_instance().setLevel('ERROR')
    with show_status(f'reading {args.source}'):
        source = read_source(args.source, args.destination, args.key, args.trust_pickle)
    found = source.content
    print(f'recognised {found}' + (f', under {found.wrapper!r}' if found.wrapper else ''))
    detector = None
    if args.detector:
        from mmengine.registry import MODELS, init_default_scope

        from .. import registered  # noqa: F401
        from ..configs import find_config, read_config
        from ..data.tasks import set_classes

        cfg = read_config(find_config(args.detector))
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        if source.classes:
            set_classes(cfg, source.classes)
        detector = MODELS.build(cfg.model)
    changes = args.conditioning, args.fold, args.condition, args.lam, args.sigmas
    with show_status(f'converting to {args.destination.name}'):
        taken, dropped, conditioning = convert(source, args.destination, *changes, args.to, detector)
    print(describe_tensors('taken', taken))
    print(describe_tensors('dropped', dropped))
    print(describe_tensors('missing', found.missing) + (', will be initialised' if found.missing else ''))
    print(f'wrote {args.destination}: arch={found.arch!r}, patch_size={found.patch_size}, conditioning={conditioning}')
