"""Try MMDetection's detectors with a SpecXCiT backbone: a config of two lines, and our commands.

    python -m benchmarks.detectors [NAME ...]

Each detector is trained for two iterations on generated images, evaluated with a report, used for prediction and
exported, with a backbone of four blocks. "amp" is a training step in bfloat16 on the CPU. docs/results/detectors.csv
has a row for each, and docs/results/detectors.md shows them; rows of finished detectors are kept unless they are named.
The output of each step is in work_dirs/detectors.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from spec_mmdet import commands
from spec_mmdet.commands.common import make_parser
from spec_mmdet.configs import read_config
from spec_mmdet.data.shapes import write_split
from spec_mmdet.files import write_atomically

TABLE, WORK = Path('docs/results/detectors.csv'), Path('work_dirs/detectors')
BACKBONE = "dict(_delete_=True, type='SpecXCiT', arch=dict(dim=32, depth=4, num_heads=4))"
STEPS = ('train', 'test', 'predict', 'export', 'amp')
LIMIT = 900  # seconds for a step
FEW_QUERIES = ('dino/',)  # these images have fewer positions than its 900 queries
PAGE = """# Detectors with a SpecXCiT backbone

`python -m benchmarks.detectors` writes this page and [detectors.csv](detectors.csv). Each detector of MMDetection is
configured by [two lines](../guide/train.md#any-detector-of-mmdetection), trained for two iterations on generated
images, evaluated with a report, used for prediction and exported. AMP is a training step in bfloat16 on the CPU; GPUs
were not tested. The backbone has four blocks. DINO has 100 queries, because the images are small. The accuracy of the
detectors was not measured. A dash means that the step was not run.

**{working} of {total} detectors train, test and predict.**

| config of MMDetection | lines | train | test | predict | export | AMP |
|---|---|---|---|---|---|---|
{table}

`spec-mmdet export` supports Mask R-CNN, Faster R-CNN and RetinaNet with their relatives; `--backbone` exports the
backbone of any detector.

## Other faults

{faults}
"""
# Configs of MMDetection, without the suffix of the file.
CONFIGS = """
    retinanet/retinanet_r50_fpn_1x_coco faster_rcnn/faster-rcnn_r50_fpn_1x_coco mask_rcnn/mask-rcnn_r50_fpn_1x_coco
    cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco fcos/fcos_r50-caffe_fpn_gn-head_1x_coco atss/atss_r50_fpn_1x_coco
    gfl/gfl_r50_fpn_1x_coco vfnet/vfnet_r50_fpn_1x_coco tood/tood_r50_fpn_1x_coco ddod/ddod_r50_fpn_1x_coco
    fsaf/fsaf_r50_fpn_1x_coco foveabox/fovea_r50_fpn_4xb4-1x_coco free_anchor/freeanchor_r50_fpn_1x_coco
    reppoints/reppoints-moment_r50_fpn_1x_coco sabl/sabl-retinanet_r50_fpn_1x_coco
    autoassign/autoassign_r50-caffe_fpn_1x_coco dyhead/atss_r50_fpn_dyhead_1x_coco yolof/yolof_r50-c5_8xb8-1x_coco
    centernet/centernet_r18_8xb16-crop512-140e_coco yolox/yolox_s_8xb8-300e_coco rtmdet/rtmdet_tiny_8xb32-300e_coco
    rtmdet/rtmdet-ins_tiny_8xb32-300e_coco yolo/yolov3_d53_8xb8-320-273e_coco detr/detr_r50_8xb2-150e_coco
    conditional_detr/conditional-detr_r50_8xb2-50e_coco dab_detr/dab-detr_r50_8xb2-50e_coco
    deformable_detr/deformable-detr_r50_16xb2-50e_coco dino/dino-4scale_r50_8xb2-12e_coco
    sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco queryinst/queryinst_r50_fpn_1x_coco
    ddq/ddq-detr-4scale_r50_8xb2-12e_coco paa/paa_r50_fpn_1x_coco htc/htc_r50_fpn_1x_coco
    htc/htc-without-semantic_r50_fpn_1x_coco point_rend/point-rend_r50-caffe_fpn_ms-1x_coco
    solo/solo_r50_fpn_1x_coco solov2/solov2_r50_fpn_1x_coco condinst/condinst_r50_fpn_ms-poly-90k_coco_instance
    yolact/yolact_r50_1xb8-55e_coco mask2former/mask2former_r50_8xb2-lsj-50e_coco
    libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco pafpn/faster-rcnn_r50_pafpn_1x_coco
    double_heads/dh-faster-rcnn_r50_fpn_1x_coco ssd/ssd300_coco tridentnet/tridentnet_r50-caffe_1x_coco
    cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco detectors/detectors_cascade-rcnn_r50_1x_coco
""".split()  # noqa: SIM905


def run_step(log: Path, step: Callable, *args: object) -> str:
    """Run a step in a process of its own, with its output in a file.

    The process is forked, because importing MMDetection takes longer than most steps.

    Returns:
        'yes', or the last line of the output if the step fails.
    """

    def redirect_and_run() -> None:
        with log.open('w') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        step(*args)

    process = multiprocessing.get_context('fork').Process(target=redirect_and_run)
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return f'longer than {LIMIT} s'
    return 'yes' if not process.exitcode else (log.read_text().strip().splitlines() or ['no message'])[-1]


def train_in_half_precision(config: Path) -> None:
    """Take a training step of a training's config under autocast.

    Raises:
        FloatingPointError: if the loss is not finite.
    """
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).train()
    MessageHub.get_current_instance().update_info_dict(dict(epoch=0, iter=0))  # of YOLOX's changing image sizes
    if hasattr(model, 'set_epoch'):  # TOOD and others; MMDetection's SetEpochInfoHook
        model.set_epoch(0)
    batch = model.data_preprocessor(next(iter(Runner.build_dataloader(cfg.train_dataloader))), training=True)
    with torch.autocast('cpu', torch.bfloat16):
        loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    if not loss.isfinite():
        raise FloatingPointError(f'the loss is {loss}')


def write_data(data: Path) -> None:
    """Write the images that all detectors are trained on."""
    for split, images in dict(train=4, val=2).items():
        write_split(data, split, images, 160, np.random.default_rng(len(split)))


def try_detector(base: str, data: Path, wanted: Sequence[str]) -> dict[str, str]:
    """Run some of the steps for a detector; those after a failed training are not tried.

    Returns:
        'yes' or an error by step.
    """
    work = WORK / Path(base).name
    if 'train' in wanted:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    config, run = work / 'detector.py', work / 'run'
    config.write_text(f"_base_ = 'mmdet::{base}.py'\nmodel = dict(backbone={BACKBONE})\n")
    last, complete = run / 'last.pth', run / config.name  # the training's config has its image size
    settings = [f'{loop}_dataloader.num_workers=0' for loop in ('train', 'val', 'test')]
    length, changes = ['--epochs', 1], settings[:2]
    if 'max_iters' in read_config(config).train_cfg:  # trains by iterations
        changes += ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2']
        length = []
    changes += ['model.num_queries=100'] * base.startswith(FEW_QUERIES)
    steps = dict(
        train=['train', config, '--data', data, '--work-dir', run, '--image-size', 160, *length, '--batch-size', 2,
               '--no-check', '--cfg-options', *changes],
        test=['test', complete, last, '--data', data, '--work-dir', work / 'test', '--report', work / 'report',
              '--no-check', '--cfg-options', settings[2]],
        predict=['predict', complete, last, data / 'val', '--out', work / 'predicted'],
        export=['export', complete, last, work / 'detector.onnx'],
    )  # fmt: skip
    results = {}
    for step, command in steps.items():
        if step not in wanted:
            continue
        results[step] = run_step(work / f'{step}.log', commands.main, [str(part) for part in command])
        if step == 'train':
            if results[step] != 'yes':
                return results
            last.symlink_to((run / 'last_checkpoint').read_text())
    if 'amp' in wanted:
        results['amp'] = run_step(work / 'amp.log', train_in_half_precision, complete)
    return results


def write_results(rows: dict[str, dict[str, str]]) -> None:
    """Write the table, and the page with its rows and faults."""
    rows = {name: rows[name] for name in CONFIGS if name in rows}
    with write_atomically(TABLE) as path, path.open('w', newline='') as file:
        table = csv.DictWriter(file, ['config', 'lines', *STEPS], restval='-')
        table.writeheader()
        table.writerows(rows.values())
    lines, faults = [], []
    for name, row in rows.items():
        words = {step: 'yes' if row.get(step) == 'yes' else 'no' if step in row else '–' for step in STEPS}
        lines.append(f'| {" | ".join([name, row["lines"], *words.values()])} |')
        failed = [step for step, word in words.items() if word == 'no' and step != 'export']
        faults += [f'* {name}, {step}: {row[step].removeprefix("error: ")}' for step in failed]
    working = sum(all(row.get(step) == 'yes' for step in ('train', 'test', 'predict')) for row in rows.values())
    page = PAGE.format(working=working, total=len(rows), table='\n'.join(lines), faults='\n'.join(faults))
    with write_atomically(TABLE.with_suffix('.md')) as path:
        path.write_text(page)


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmarks.detectors', __doc__, 'python -m')
    options.add_argument('names', nargs='*', metavar='NAME', help='folders of configs, for instance retinanet '
                         '(default: all that have no row yet)')  # fmt: skip
    options.add_argument('--steps', nargs='+', choices=STEPS, default=STEPS, help='steps to run; those after train '
                         'continue from an earlier one (default: all)')  # fmt: skip
    args = options.parse_args(argv)
    if unknown := {*args.names} - {base.split('/')[0] for base in CONFIGS}:
        options.error(f'{", ".join(sorted(unknown))}: not among the folders of CONFIGS in {Path(__file__).name}')
    found = csv.DictReader(TABLE.read_text().splitlines()) if TABLE.is_file() else ()
    rows = {row['config']: {key: value for key, value in row.items() if value != '-'} for row in found}
    data = WORK.resolve() / 'data'
    WORK.mkdir(parents=True, exist_ok=True)
    run_step(WORK / 'data.log', write_data, data)
    for base in CONFIGS:
        if base.split('/')[0] not in args.names and (args.names or base in rows and {*args.steps} <= {*rows[base]}):
            continue
        rows[base] = rows.get(base, {}) | dict(config=base, lines='2') | try_detector(base, data, args.steps)
        print(', '.join(f'{key}: {value}' for key, value in rows[base].items()), flush=True)
        write_results(rows)


if __name__ == '__main__':
    with commands.command_line():
        main()
