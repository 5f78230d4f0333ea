"""The whole way on generated data: make it, train, evaluate, and leave a page with the results.

Everything is written below data/shapes and work_dirs/demo; each step is a command that can be typed by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.pages import PAGE
from ..files import replace_folder
from .common import parser, run_command

CONFIG = 'xcit_spec_shapes'
DATA = Path('data/shapes')
WORK = Path('work_dirs/demo')


def main(argv: Sequence[str] | None = None) -> None:
    parser('demo', __doc__).parse_args(argv)
    start = time.time()
    with replace_folder(WORK):
        run_command('shapes', DATA)
        run_command('train', CONFIG, '--work-dir', WORK)
        checkpoint = WORK / (WORK / 'last_checkpoint').read_text()
        run_command('test', CONFIG, checkpoint, '--work-dir', WORK / 'test', '--report', WORK / 'report')
    print(f'\ntook {time.time() - start:.0f} s; pictures, curves and tables are in {WORK}')
    print(f'the results as a page: {WORK / "report" / PAGE}')
