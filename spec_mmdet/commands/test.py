"""Evaluate a detector with COCO's box and mask AP, after checking all of its inputs.

    spec-mmdet test xcit_spec_maskrcnn CHECKPOINT --data FOLDER --report DIR

The options are those of MMDetection's own script, --data and --report.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process

from ..checkpoints.reading import fetch, get_run_info, load
from ..data.fitting import coco_datasets, configured_classes
from ..errors import InputError, list_briefly
from ..evaluation import report
from ..evaluation.drawing import use_font_for
from ..evaluation.metrics import DumpPredictions
from ..evaluation.pages import PAGE
from ..files import display_path, write_folder_atomically
from ..training.guards import end_workers
from ..training.processes import decide_on_main
from .common import (
    adapt_to_data,
    add_run_options,
    build_runner,
    load_run_config,
    one_line_errors,
    parser,
    read_classes,
)
from .terminal import Terminal


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser('test', __doc__)
    add_run_options(options)
    options.add_argument('checkpoint', help='a checkpoint of the detector')
    options.add_argument('--report', type=Path, metavar='DIR', help='a folder for a page with the results')
    options.add_argument('--out', type=Path, metavar='FILE', help='a .pkl file for the predictions')
    options.add_argument('--show', action='store_true', help='show the predictions in a window')
    options.add_argument('--show-dir', type=Path, metavar='DIR', help='a folder for the predictions, drawn')
    options.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows each (default: 2)')
    options.add_argument(
        '--tta', action='store_true', help='merge the predictions of each image and of its mirror image'
    )
    args = options.parse_args(argv)
    if args.out and args.out.suffix not in ('.pkl', '.pickle'):
        raise InputError(f'--out {args.out}: the name must end in .pkl or .pickle')
    if args.show_dir:
        # MMDetection puts a relative one below the work directory, and each batch's below the last one's.
        args.show_dir = str(args.show_dir.resolve())
    return args


def augment(cfg: Config) -> None:
    """Test-time augmentation as the config has it, or else by flipping; changes ``cfg``."""
    if 'tta_model' not in cfg:
        cfg.tta_model = dict(
            type='MaskTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        )
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        views = [
            [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
            [dict(type='PackDetInputs', meta_keys=keys)],
        ]
        cfg.tta_pipeline = [*copy.deepcopy(dataset.pipeline[:-1]), dict(type='TestTimeAug', transforms=views)]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def require_measured(metrics: dict[str, float]) -> None:
    """Refuse figures that say nothing.

    Raises:
        InputError: where an AP is the -1 by which pycocotools says that there is no object to measure by.
    """
    nothing = [name for name, value in metrics.items() if name.endswith('_mAP') and value == -1]
    if nothing:
        raise InputError(f'{list_briefly(nothing)} is -1: there is no object to measure by (crowds do not count)')


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    cfg = load_run_config(args, splits=('test',))
    classes = decide_on_main(lambda: read_classes(args.checkpoint))
    adapt_to_data(cfg, ('test',), classes, not args.no_check)
    cfg.load_from = fetch(args.checkpoint)
    reported = args.report if is_main_process() else None
    decide_on_main(lambda: reported and report.prepare(reported, cfg))
    if args.show or args.show_dir:
        trigger_visualization_hook(cfg, args)
        cfg.default_hooks.visualization.type = 'PictureHook'
    if args.tta:
        augment(cfg)

    setup_cache_size_limit_of_dynamo()
    datasets = coco_datasets(cfg.test_dataloader) if args.show or args.show_dir else ()
    terminal = None if args.verbose else Terminal()
    names = [name for dataset in datasets for name in configured_classes(dataset)]
    with write_folder_atomically(reported) if reported else nullcontext() as aside:
        with one_line_errors(), use_font_for(names), terminal or nullcontext():
            runner = build_runner(cfg, terminal)
            if args.out:
                metrics = runner.test_evaluator.metrics
                metrics.append(DumpPredictions(str(args.out), metrics))
            try:
                metrics = runner.test()
            finally:
                end_workers(runner)
            if reported:
                tested = report.TestResults.from_runner(runner, get_run_info(load(args.checkpoint, mmap=True)))
            del runner
        require_measured(metrics)
        if reported:
            command = ['spec-mmdet', 'test', *(sys.argv[1:] if argv is None else argv)]
            report.write(aside, cfg, args.checkpoint, command, tested)
    if reported:
        print(f'report: {display_path(reported / PAGE)}')
