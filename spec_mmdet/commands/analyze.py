"""Compute condition numbers of a backbone's projections and attention Jacobians, as a table, CSV files and a plot.

    spec-mmdet analyze xcit_spec_maskrcnn [CHECKPOINT] [--images DIR]

Without a checkpoint, the config's initial weights are used. Jacobians depend on the tokens, so they are computed on
images, only for XCA layers; each number is the median over the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..status import show_status
from .common import add_config, load_config, make_parser


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('analyze', __doc__)
    add_config(options)
    options.add_argument('checkpoint', nargs='?', help='file or URL, in any layout of XCiT (default: '
                         "the config's initial weights)")  # fmt: skip
    options.add_argument('--images', type=Path, metavar='FOLDER', help='folder of images for the Jacobians (default: '
                         'no Jacobians)')  # fmt: skip
    options.add_argument('--max-images', type=int, metavar='N', default=4, help='number of images to use '
                         '(default: 4)')  # fmt: skip
    options.add_argument('--heads', type=int, metavar='N', help='number of heads per layer to use for the Jacobian '
                         '(default: all, or one if heads are wider than 32 channels, at about a second each)',
                         )  # fmt: skip
    options.add_argument('--out', type=Path, default=Path('work_dirs/conditioning'), help='folder of the files '
                         '(default: work_dirs/conditioning)')  # fmt: skip
    args = options.parse_args(argv)

    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from ..data.images import IMAGE_SUFFIXES
    from ..errors import InputError
    from ..inference.analysis import build_backbone, format_jacobians, measure_jacobians, write_analysis
    from ..training.hooks import measure_backbone

    if min(args.max_images, args.heads or 1) < 1:
        raise InputError('--max-images and --heads: use at least 1')
    images = []
    if args.images:
        images = sorted(path for path in args.images.glob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
        if not (images := images[: args.max_images]):
            raise InputError(
                f'--images {args.images}: no such folder, or contains no images ({", ".join(sorted(IMAGE_SUFFIXES))})'
            )
    MMLogger.get_current_instance().setLevel('ERROR')  # it lists every weight that it initialises
    register_all_modules()
    cfg = load_config(args)
    with show_status('measuring projections'):
        backbone = build_backbone(cfg, args.checkpoint)
        report = measure_backbone(backbone)
    if not report:
        raise InputError(f'config {args.config}: {cfg.model.backbone.type} has no attention. Use another backbone')
    print(report)
    # Of trained weights, or those of convert --condition, W alone has no meaning.
    is_random = not args.checkpoint and not cfg.model.backbone.get('init_cfg')
    if is_random and (worsened := report.describe_worsened()):
        print(f'\nwarning: {worsened}')
    with show_status('measuring Jacobians'):
        spectra = measure_jacobians(cfg, backbone, images, args.heads)
    if spectra:
        print(f'\n{format_jacobians(spectra)}\non {len(images)} images: {", ".join(path.name for path in images)}')
    elif images:
        print('\nno Jacobians: they are implemented only for XCA layers')
    print('\nwrote', ', '.join(map(str, write_analysis(args.out, report, spectra, images))))
