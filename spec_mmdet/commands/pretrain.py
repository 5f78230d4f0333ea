"""Train a classifier with SpecXCiT's blocks, whose weights a detector can start from.

    spec-mmdet pretrain pretrain_xcit_small_12_p16 --data FOLDER
    spec-mmdet convert work_dirs/pretrain_xcit_small_12_p16/epoch_400.pth backbone.pth

FOLDER/train/CLASS/ and FOLDER/val/CLASS/ contain the images. A conditioned backbone is pretrained with its
conditioning: --cfg-options model.backbone.conditioning.type=identity model.backbone.conditioning.lam=10. Signals and
--resume work as in train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import InputError, list_briefly
from .common import add_run_options, add_training_options, load_run_config, make_parser, require_positive

if TYPE_CHECKING:
    from mmengine.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('pretrain', __doc__)
    add_run_options(options)
    add_training_options(options)
    options.add_argument('--image-size', type=require_positive(int), metavar='N', help='height and width of the '
                         "classifier's images in pixels (default: the config's)")  # fmt: skip
    args = options.parse_args(argv)

    try:
        from ..data.classification import SPLITS, check_class_folders, use_class_folders
    except ImportError as error:
        raise InputError(f'pretraining needs timm. Run: pip install timm ({error})') from error
    from mmengine.dist import get_world_size

    from ..processes import decide_on_main
    from ..training.running import train
    from ..training.schedule import set_schedule

    def change(cfg: Config) -> None:
        if cfg.get('model', {}).get('type') != 'ImageClassifier':
            raise InputError(
                f'{args.config}: not a classifier (ImageClassifier). Train detectors with "spec-mmdet train"'
            )
        if args.data:
            use_class_folders(cfg, args.data)
        set_schedule(cfg, args.epochs, args.batch_size, args.lr, args.auto_scale_lr)
        for split in SPLITS if args.image_size else ():
            cfg[f'{split}_dataloader'].dataset.transform.input_size = args.image_size

    def adapt(known: list[str] | None) -> None:
        def check() -> int:
            classes = check_class_folders(cfg, not args.no_check, get_world_size())
            print(f'{len(classes)} classes: {list_briefly(classes)}')
            if known and list(known) != classes:
                raise InputError(
                    f'the {len(known)} classes of the checkpoint differ from the {len(classes)} classes of the data. '
                    'Use the same data, or start a new training'
                )
            return len(classes)

        cfg.model.backbone.num_classes = decide_on_main(check)

    cfg = load_run_config(args, (), change)
    train(cfg, adapt, args.resume, args.amp, args.auto_scale_lr, args.verbose, save_on_signals=not args.keep_types)
