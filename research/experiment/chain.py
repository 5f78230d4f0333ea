"""Run the trainings of one run of the experiment, from the initial weights to its log."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config

from spec_mmdet.errors import InputError
from spec_mmdet.files import replace_folder
from spec_mmdet.training.results import find_commit, read_curves
from spec_mmdet.training.speed import describe_processor

from .arms import DETECTION, PRETRAINED, PRETRAINING, SCREENING_SEED, Run, Size, write_config, write_start

WORK = Path('work_dirs/experiment')


def run_in_process(log: str, threads: int, command: str, argv: list[str]) -> None:
    """Run a command of spec-mmdet as this process, its output appended to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    sys.argv = ['spec-mmdet', command, *argv]
    from spec_mmdet.commands import run

    run(command, argv)


class Chain:
    """The commands of a run: pretrain, convert, train.

    Args:
        size: of the experiment.
        data: the folder of the scenes.
        threads: of each process.
    """

    def __init__(self, size: Size, data: Path, threads: int) -> None:
        self.size, self.data, self.threads = size, data, threads
        cfg = Config.fromfile(DETECTION)
        self.backbone = {key: value for key, value in cfg.model.backbone.to_dict().items()
                         if key not in ('type', 'conditioning', 'init_cfg')}  # fmt: skip
        if size.arch:
            self.backbone['arch'] = size.arch
        # The server imports the commands' modules once, so that each command starts quickly.
        os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # a process that has initialised CUDA cannot be forked
        self.context = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload(
            ['spec_mmdet.registered', 'spec_mmdet.training.running', 'spec_mmdet.data.classification']
        )

    def run_command(self, work: Path, command: str, *argv: object) -> None:
        """Run a command of spec-mmdet, its output in a log file beside the work directory.

        Raises:
            InputError: if it fails.
        """
        log = work.with_name(f'{work.name}.log')
        args = (str(log), self.threads, command, [*map(str, argv)])
        process = self.context.Process(target=run_in_process, args=args)
        process.start()
        process.join()
        if process.exitcode:
            raise InputError(f'spec-mmdet {command} failed for {work.name}: see {log}')

    def train(self, run: Run) -> dict:
        """Train and evaluate; returns the log."""
        work, start = WORK / run.name, time.time()
        with replace_folder(work):
            work.mkdir(parents=True)
            log: dict = dict(arm=run.arm.name, group=run.arm.group, seed=run.seed, conditioning=run.arm.conditioning)
            log['stage'] = 'screening' if run.seed == SCREENING_SEED else run.start
            backbone = work / 'start.pth'
            write_start(backbone, self.backbone, run.arm, run.seed)
            curves = {}
            if run.start == PRETRAINED:
                config, folder = work / 'pretraining.py', work / 'pretraining'
                write_config(config, PRETRAINING, run.arm, run.seed, backbone, self.size.arch)
                self.run_command(work, 'pretrain', config, '--data', self.data / 'pretraining', '--work-dir', folder,
                                 '--image-size', self.size.crop_pixels)  # fmt: skip
                backbone = work / 'backbone.pth'
                self.run_command(work, 'convert', folder / (folder / 'last_checkpoint').read_text(), backbone)
                curves['pretraining'] = read_curves(folder)
            config, folder = work / 'detection.py', work / 'detection'
            write_config(config, DETECTION, run.arm, run.seed, backbone, self.size.arch)
            self.run_command(work, 'train', config, '--data', self.data / 'detection', '--work-dir', folder,
                             '--image-size', self.size.pixels, '--no-check')  # fmt: skip
            curves['detection'] = read_curves(folder)
        return dict(
            log,
            ap={kind: curves['detection'][f'{kind} AP'][1][-1] for kind in ('box', 'mask')},
            curves={stage: {name: [xs, [float(f'{y:.4g}') for y in ys]] for name, (xs, ys) in of_stage.items()}
                    for stage, of_stage in curves.items()},
            seconds=round(time.time() - start),
            commit=find_commit(Path(__file__)),
            device=describe_processor('cuda' if torch.cuda.device_count() else 'cpu'),
        )  # fmt: skip
