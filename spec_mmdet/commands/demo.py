"""Run the complete workflow on generated data: write images, train, evaluate, and write a report.

Everything is written to data/shapes and work_dirs/demo, or with --config to work_dirs/CONFIG. The commands for training
and evaluation are printed. On Linux without a GPU two processes train, because they use the cores better than one.

    spec-mmdet demo                                      # Mask R-CNN
    spec-mmdet demo --config xcit_spec_panoptic_shapes   # PanopticFPN
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .common import make_parser, run_command, run_in_processes

CONFIG = 'xcit_spec_shapes'
DATA = Path('data/shapes')
WORK = Path('work_dirs/demo')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('demo', __doc__)
    options.needs = 'data.shapes'
    options.add_argument('--config', default=CONFIG, help=f'a config for data/shapes (default: {CONFIG})')
    config = options.parse_args(argv).config
    work = WORK if config == CONFIG else WORK.with_name(Path(config).stem)

    import torch
    from mmengine.device import get_device

    from ..configs import find_config, read_config
    from ..data.shapes import write_shapes
    from ..evaluation.pages import PAGE
    from ..files import replace_folder

    start = time.time()
    command = 'train', config, '--work-dir', work
    threads, batch_size = torch.get_num_threads(), read_config(find_config(config)).train_dataloader.batch_size
    with replace_folder(work):
        write_shapes(DATA)
        if sys.platform == 'linux' and get_device() == 'cpu' and threads > 1 and batch_size % 2 == 0:
            run_in_processes(2, threads // 2, *command, '--batch-size', str(batch_size // 2))
        else:
            run_command(*command)
        checkpoint = work / (work / 'last_checkpoint').read_text()
        run_command('test', config, checkpoint, '--work-dir', work / 'test', '--report', work / 'report')
    print(f'\ntook {time.time() - start:.0f} s; pictures, curves and tables are in {work}')
    print(f'report: {work / "report" / PAGE}')
