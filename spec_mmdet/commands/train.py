"""Train a detector, after checking its inputs.

    spec-mmdet train xcit_maskrcnn --data FOLDER --auto-scale-lr

The command has the options of MMDetection's script, and also --data, --preset, --epochs, --batch-size, --image-size and
--lr, which change all related settings of the config. --cfg-options are applied last.

SIGTERM and Ctrl-C save a checkpoint after the current iteration and exit with status 143 or 130; a second signal exits
at once. With --resume, training continues exactly there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .common import add_run_options, add_training_options, load_run_config, make_parser, require_positive

if TYPE_CHECKING:
    from mmengine.config import Config

PRESETS = ('finetune',)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = make_parser('train', __doc__)
    add_run_options(options)
    add_training_options(options)
    options.add_argument('--image-size', type=require_positive(int), metavar='N', help='shorter side of a test image '
                         'in pixels; sizes and crops for training are scaled with it (default: the '
                         "config's)")  # fmt: skip
    options.add_argument('--preset', choices=PRESETS, help="schedule for pretrained weights that replaces the "
                         "config's (default: none)")  # fmt: skip
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    from ..configs import CONFIGS, read_config
    from ..training.running import adapt_to_data, train
    from ..training.schedule import require_epochs, set_image_size, set_schedule

    def change(cfg: Config) -> None:
        if args.preset:
            require_epochs(cfg, f'--preset {args.preset}', '--lr RATE and --cfg-options train_cfg.max_iters=N')
            cfg.merge_from_dict(read_config(CONFIGS / 'presets' / f'{args.preset}.py').to_dict())
        set_schedule(cfg, args.epochs, args.batch_size, args.lr, args.auto_scale_lr)
        if args.image_size:
            set_image_size(cfg, args.image_size)

    cfg = load_run_config(args, ('train', 'val', 'test'), change)
    train(
        cfg,
        lambda classes: adapt_to_data(cfg, ('train', 'val'), classes, not args.no_check),
        args.resume,
        args.amp,
        args.auto_scale_lr,
        args.verbose,
        save_on_signals=not args.keep_types,
    )
