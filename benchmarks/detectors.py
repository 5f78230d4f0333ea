"""Try MMDetection's detectors with a SpecXCiT backbone: a config of two lines, and our commands.

    python -m benchmarks.detectors [NAME ...]

Each detector is trained for two iterations on generated images, evaluated, used for prediction and exported, with a
backbone of four blocks. The table, docs/results/detectors.csv, has a row for each; rows of finished detectors are kept
unless they are named.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.data.shapes import write_split
from spec_mmdet.files import write_atomically

TABLE = Path('docs/results/detectors.csv')
BACKBONE = "dict(_delete_=True, type='SpecXCiT', arch=dict(dim=32, depth=4, num_heads=4))"
STEPS = ('train', 'test', 'predict', 'export')
LIMIT = 900  # seconds for a command
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
    htc/htc-without-semantic_r50_fpn_1x_coco point_rend/point-rend_r50-caffe_fpn_ms-1x_coco
    solo/solo_r50_fpn_1x_coco solov2/solov2_r50_fpn_1x_coco condinst/condinst_r50_fpn_ms-poly-90k_coco_instance
    yolact/yolact_r50_1xb8-55e_coco mask2former/mask2former_r50_8xb2-lsj-50e_coco
    libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco pafpn/faster-rcnn_r50_pafpn_1x_coco
    double_heads/dh-faster-rcnn_r50_fpn_1x_coco ssd/ssd300_coco tridentnet/tridentnet_r50-caffe_1x_coco
    cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco detectors/detectors_cascade-rcnn_r50_1x_coco
""".split()  # noqa: SIM905


def run_step(*command: object) -> str:
    """Run a command of spec-mmdet: '' if it succeeds, or else the last line that it prints."""
    try:
        done = subprocess.run([sys.executable, '-m', 'spec_mmdet', *map(str, command)], capture_output=True, text=True,
                              timeout=LIMIT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return f'longer than {LIMIT} s'
    return '' if not done.returncode else (done.stderr.strip().splitlines() or ['no message'])[-1]


def try_detector(base: str, folder: Path, data: Path) -> dict[str, str]:
    """Run the commands for a detector; those after a failed training are not tried.

    Returns:
        'yes' or an error by command.
    """
    config, work = folder / f'{Path(base).name}.py', folder / Path(base).name
    config.write_text(f"_base_ = 'mmdet::{base}.py'\nmodel = dict(backbone={BACKBONE})\n")
    last, complete = work / 'last.pth', work / config.name  # the training's config has its image size
    settings = [f'{loop}_dataloader.num_workers=0' for loop in ('train', 'val', 'test')]
    commands = dict(
        train=['train', config, '--data', data, '--work-dir', work, '--image-size', 128, '--epochs', 1, '--batch-size',
               4, '--no-check', '--cfg-options', *settings[:2]],
        test=['test', complete, last, '--data', data, '--work-dir', work, '--report', work / 'report', '--no-check',
              '--cfg-options', settings[2]],
        predict=['predict', complete, last, data / 'val', '--out', work / 'predicted'],
        export=['export', complete, last, work / 'detector.onnx'],
    )  # fmt: skip
    results = {}
    for step in STEPS:
        results[step] = run_step(*commands[step]) or 'yes'
        if step == 'train':
            if results[step] != 'yes':
                break
            last.symlink_to((work / 'last_checkpoint').read_text())
    return results


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('benchmarks.detectors', __doc__, 'python -m')
    options.add_argument('names', nargs='*', metavar='NAME', help='folders of configs, for instance retinanet '
                         '(default: all that have no row yet)')  # fmt: skip
    args = options.parse_args(argv)
    rows = {row['config']: row for row in csv.DictReader(TABLE.open())} if TABLE.is_file() else {}
    with TemporaryDirectory() as temporary:
        data = Path(temporary, 'data')
        for split, images in dict(train=8, val=2).items():
            write_split(data, split, images, 128, np.random.default_rng(len(split)))
        for base in CONFIGS:
            if base.split('/')[0] not in args.names and (args.names or base in rows):
                continue
            rows[base] = dict(config=base, lines='2') | try_detector(base, Path(temporary), data)
            print(', '.join(f'{key}: {value}' for key, value in rows[base].items()), flush=True)
            with write_atomically(TABLE) as path, path.open('w', newline='') as file:
                table = csv.DictWriter(file, ['config', 'lines', *STEPS], restval='-')
                table.writeheader()
                table.writerows(rows[name] for name in CONFIGS if name in rows)


if __name__ == '__main__':
    with command_line():
        main()
