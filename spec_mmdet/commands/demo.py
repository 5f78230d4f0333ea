"""Run the complete workflow on generated data: write images, train, evaluate, and write a report.

Everything is written to data/shapes and work_dirs/demo. The commands for training and evaluation are printed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from .common import make_parser, run_command

CONFIG = 'xcit_spec_shapes'
DATA = Path('data/shapes')
WORK = Path('work_dirs/demo')


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('demo', __doc__)
    options.needs = 'data.shapes'
    options.parse_args(argv)

    from ..data.shapes import write_shapes
    from ..evaluation.pages import PAGE
    from ..files import replace_folder

    start = time.time()
    with replace_folder(WORK):
        write_shapes(DATA)
        run_command('train', CONFIG, '--work-dir', WORK)
        checkpoint = WORK / (WORK / 'last_checkpoint').read_text()
        run_command('test', CONFIG, checkpoint, '--work-dir', WORK / 'test', '--report', WORK / 'report')
    print(f'\ntook {time.time() - start:.0f} s; pictures, curves and tables are in {WORK}')
    print(f'report: {WORK / "report" / PAGE}')
