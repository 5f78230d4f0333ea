"""Evaluate a detector with COCO's box and mask AP, after checking its inputs.

    spec-mmdet test xcit_maskrcnn CHECKPOINT --data FOLDER --report DIR

The command has the options of MMDetection's script, and also --data and --report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from ..errors import InputError, list_briefly
from ..files import one_line_write_errors
from ..status import show_status
from .common import add_run_options, load_run_config, make_parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = make_parser('test', __doc__)
    add_run_options(options)
    options.add_argument('checkpoint', help='file or URL of a checkpoint, or an exported .onnx file')
    options.add_argument('--report', type=Path, metavar='DIR', help='folder for an HTML report (default: no report)')
    options.add_argument('--out', type=Path, metavar='FILE', help='.pkl file for the predictions (default: none)')
    options.add_argument('--show', action='store_true', help='show the predictions in a window')
    options.add_argument(
        '--show-dir', type=Path, metavar='DIR', help='write pictures of the predictions to this folder (default: none)'
    )
    options.add_argument('--wait-time', type=float, default=2, help='seconds for each picture of --show (default: '
                         '2)')  # fmt: skip
    options.add_argument('--tta', action='store_true', help='test-time augmentation: merge the predictions on each '
                         'image and its mirror image')  # fmt: skip
    args = options.parse_args(argv)
    if args.out and args.out.suffix not in ('.pkl', '.pickle'):
        raise InputError(f'--out {args.out}: the name must end in .pkl or .pickle')
    if args.tta and args.checkpoint.endswith('.onnx'):
        raise InputError(f'--tta is not possible with an exported detector, {args.checkpoint}. Test its checkpoint')
    if args.show_dir:
        # MMDetection resolves a relative folder for each batch anew, relative to that of the previous batch.
        with one_line_write_errors(args.show_dir, args.show_dir):
            args.show_dir.mkdir(parents=True, exist_ok=True)
        args.show_dir = str(args.show_dir.resolve())
    return args


def require_measured(metrics: dict[str, float]) -> None:
    """Check that there were objects to evaluate on.

    Raises:
        InputError: if an AP is -1, pycocotools' value without objects.
    """
    undefined = [name for name, value in metrics.items() if name.endswith('_mAP') and value == -1]
    if undefined:
        raise InputError(f'{list_briefly(undefined)} is -1, because there are no objects (crowds do not count). Check '
                         'the classes and annotations with "spec-mmdet prepare"')  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.registry import MODELS, VISUALIZERS
    from mmdet.utils import setup_cache_size_limit_of_dynamo
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.dist import is_main_process

    from ..checkpoints.reading import describe_state, fetch, get_classes, get_run_info, load, verify_checkpoint
    from ..configs import is_kind_of
    from ..data.fitting import has_masks
    from ..data.tasks import list_classes
    from ..evaluation import report
    from ..evaluation.drawing import use_font_for
    from ..evaluation.metrics import DumpPredictions
    from ..evaluation.pages import PAGE
    from ..files import compute_digest, display_path, write_folder_atomically
    from ..inference.inferencer import use_exported
    from ..models.tta import use_augmentation
    from ..processes import decide_on_main
    from ..training.guards import end_workers
    from ..training.results import is_of_training, read_curves
    from ..training.running import adapt_to_data, build_runner, one_line_errors
    from ..training.terminal import Terminal

    cfg = load_run_config(args, splits=('test',))
    if exported := args.checkpoint.endswith('.onnx'):
        model = cfg.model
        use_exported(cfg, args.checkpoint)
        found = MODELS.build(cfg.model)
        classes = found.classes
        if 'masks' in found.outputs:
            cfg.model = model  # otherwise masks are neither loaded nor evaluated
    else:
        classes = decide_on_main(lambda: get_classes(verify_checkpoint(args.checkpoint)))
    adapt_to_data(cfg, ('test',), classes, not args.no_check)
    if exported:
        use_exported(cfg, args.checkpoint)
    else:
        cfg.load_from = fetch(args.checkpoint)
    reported = args.report if is_main_process() else None
    if args.report:  # each process may write predictions
        cfg.test_evaluator = decide_on_main(lambda: report.prepare(args.report, cfg))
    if args.show or args.show_dir:
        trigger_visualization_hook(cfg, args)
        cfg.default_hooks.visualization.type = 'PictureHook'
        if not is_kind_of(cfg.visualizer, VISUALIZERS, DetLocalVisualizer):  # MMSegmentation's draws for its own hook
            cfg.visualizer.type = 'mmdet.LabelVisualizer'
    if args.tta:
        use_augmentation(cfg, has_masks(cfg.model))

    setup_cache_size_limit_of_dynamo()
    terminal = None if args.verbose else Terminal()
    names = list_classes(cfg, 'test') if args.show or args.show_dir else ()
    with write_folder_atomically(reported) if reported else nullcontext() as temporary:
        with one_line_errors(), use_font_for(names), terminal or nullcontext():
            runner = build_runner(cfg, terminal)
            if args.out:
                evaluators = runner.test_evaluator.metrics
                evaluators.append(DumpPredictions(str(args.out), evaluators))
            try:
                metrics = runner.test()
            finally:
                end_workers(runner)
            if reported:
                content = {} if exported else load(args.checkpoint, mmap=True)
                run, place = get_run_info(content), Path(args.checkpoint).parent
                if exported:
                    state = dict(sha256=compute_digest(Path(args.checkpoint)), position='exported', seed=None)
                else:
                    state = describe_state(content)
                curves = read_curves(place) if is_of_training(run, place) else {}
                tested = report.TestResults.from_runner(runner, run, state, curves)
            del runner
        require_measured(metrics)
        if reported:
            command = ['spec-mmdet', 'test', *(sys.argv[1:] if argv is None else argv)]
            with show_status('writing the report'):
                report.write(temporary, cfg, args.checkpoint, command, tested)
    if reported:
        print(f'report: {display_path(reported / PAGE)}')
