"""Time the loading of a data set's training images by the steps of xcit_maskrcnn's pipeline.

python -m benchmarks.loading FOLDER
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules

from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.configs import find_config, read_config
from spec_mmdet.data.tasks import use_folder
from spec_mmdet.training.running import adapt_to_data
from spec_mmdet.training.speed import describe_processor


def measure_loading(folder: Path, count: int = 64) -> list[dict]:
    """Measure the processor time of each step of the training pipeline on one thread.

    Args:
        folder: a data set in COCO's layout.
        count: images to load.

    Returns:
        A row for each step with its milliseconds per image, the longest first.
    """
    register_all_modules()
    cfg = read_config(find_config('xcit_maskrcnn'))
    use_folder(cfg, folder, ['train'])
    adapt_to_data(cfg, ['train'], None, thorough=False)
    cv2.setNumThreads(0)  # as in MMEngine's workers
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.full_init()
    seconds = dict.fromkeys(dataset.pipeline.transforms, 0.0)
    np.random.seed(0)
    for i in range(count):
        sample = dataset.get_data_info(i % len(dataset))
        for step in seconds:
            start = time.process_time()
            sample = step(sample)
            seconds[step] += time.process_time() - start
    rows = [dict(step=type(step).__name__, ms=1000 * total / count) for step, total in seconds.items()]
    return sorted(rows, key=lambda row: -row['ms'])


def main(argv: Sequence[str] | None = None) -> None:
    options = make_parser('loading', __doc__, 'python -m benchmarks.')
    options.add_argument('folder', type=Path, help="a data set in COCO's layout")
    args = options.parse_args(argv)
    steps = measure_loading(args.folder)
    total = sum(row['ms'] for row in steps)
    print(f'{1000 / total:.1f} images per second on one thread; {describe_processor("cpu")}\n')
    print('| step | ms per image |\n|---|---|')
    for row in steps:
        print(f'| {row["step"]} | {row["ms"]:.1f} |')


if __name__ == '__main__':
    with command_line():
        main()
