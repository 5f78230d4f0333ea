"""Does the conditioning help a detector? For every arm and seed: pretrain, convert, fine-tune, evaluate.

    spec-mmdet experiment

First a screening of lambda with one seed; then every final arm with three other seeds, fine-tuned from its own
pretraining and, some of them, from scratch with the same budget. All arms of a seed start from the same W0 and see the
same images in the same order. A finished run leaves a small log in docs/experiment/, and is not done again: the
experiment goes on wherever the logs are. docs/experiment.md is written from them, at the end or by --report alone.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from mmengine.config import Config

from ..conditioning import Correction, Report, conditioned_initialisation, find_projections
from ..configs import find_config
from ..errors import InputError
from ..evaluation import study
from ..files import replace_folder, write
from ..models.xcit import SpecXCiT
from ..training.results import find_commit, read_curves
from ..training.saving import serialize
from .benchmark import processor
from .common import parser

PRETRAINING, DETECTION = 'experiment_pretraining', 'experiment_maskrcnn'
SCREENED = (0.5, 1, 2, 5)  # times sigma_max of the initial weights
PAPER = 10.0  # lambda of the paper
SCREENING_SEED, SEEDS = 0, (1, 2, 3)
PRETRAINED, SCRATCH = 'pretrained', 'scratch'
WORK = Path('work_dirs/experiment')
LOGS = Path('docs/experiment')


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        scenes, val, crops: numbers of images.
        pixels, crop_pixels: their height and width.
        arch: of the backbone; None for that of the configs.
    """

    scenes: int
    val: int
    crops: int
    pixels: int
    crop_pixels: int
    arch: dict | None = None


SIZES = dict(
    cpu=Size(1200, 300, 6000, 128, 48),
    gpu=Size(8000, 1000, 40000, 256, 96, dict(dim=192, depth=12, num_heads=4)),
)


@dataclass(frozen=True)
class Arm:
    """A way of training.

    Attributes:
        name: of it.
        conditioning: of the backbone, in pretraining and in detection.
        start: what the initial W0 becomes: 'W0'; 'W0 + C', once, with the C of ``initial``; 'conditioned' rows.
        initial: the conditioning that gives that C.
        rate: what the learning rate of the projections' weights is multiplied by.
    """

    name: str
    conditioning: dict | None = None
    start: str = 'W0'
    initial: dict | None = None
    rate: float = 1.0


def identity(lam: float, per_head: bool) -> dict:
    return dict(type='identity', lam=lam, per_head=per_head)


def form(per_head: bool) -> str:
    return 'per head' if per_head else 'full'


def screened(backbone: dict) -> list[Arm]:
    """The arms of the screening, for a backbone whose initial weights say what sigma_max is."""
    torch.manual_seed(SCREENING_SEED)
    model = SpecXCiT(**backbone)
    arms = [Arm('plain')]
    for per_head in (False, True):
        sigma = max(row.sigma_max for row in Report(list(find_projections(model)), by_head=per_head))
        arms += [
            Arm(f'{form(per_head)}, {times:g} sigma', identity(float(f'{times * sigma:.3g}'), per_head))
            for times in SCREENED
        ]
        arms.append(Arm(f'{form(per_head)}, 10', identity(PAPER, per_head)))
    return arms


def final(backbone: dict, logs: Sequence[dict]) -> list[Arm]:
    """The arms of the experiment proper, given the logs of the screening.

    Raises:
        InputError: if the screening is not finished.
    """
    arms = screened(backbone)
    by_arm = {log['arm']: log for log in logs if log['seed'] == SCREENING_SEED}
    if missing := [arm.name for arm in arms if arm.name not in by_arm]:
        raise InputError(f'the screening lacks {", ".join(missing)}')
    chosen = [arms[0]]
    for per_head in (False, True):
        own = [arm for arm in arms if arm.name.startswith(form(per_head))]
        best = max(own, key=lambda arm: by_arm[arm.name]['ap']['box'])
        chosen += [best] + [arm for arm in own if arm.name.endswith(', 10') and arm is not best]
    full = identity(PAPER, False)
    return [
        *chosen,
        Arm('svd', dict(type='svd')),
        Arm('W0 + 10 I, decayed to 0', start='W0 + C', initial=full),
        Arm('conditioned initialisation', start='conditioned'),
        Arm('full, 10, faster rows', full, rate=round(PAPER / (0.02 * math.sqrt(backbone['arch']['dim'])))),
    ]


def from_scratch(arms: Sequence[Arm]) -> list[Arm]:
    """Those of the final arms that are also trained without pretraining: the fixed ones, whatever was chosen."""
    return [arm for arm in arms if arm.name in ('plain', 'full, 10', 'svd', 'conditioned initialisation')]


@dataclass(frozen=True)
class Run:
    """An arm with a seed, from a start: 'pretrained' or 'scratch'."""

    arm: Arm
    seed: int
    start: str = PRETRAINED

    @property
    def name(self) -> str:
        """For files."""
        words = ''.join(c if c.isalnum() or c == '.' else ' ' for c in self.arm.name).split()
        return f'{"-".join(words)}_seed{self.seed}_{self.start}'


SEEDED = Lock()  # trainings begin in threads of one process, which has one generator of random numbers


def write_start(path: Path, backbone: dict, arm: Arm, seed: int) -> None:
    """Write the weights that an arm starts from: those that the seed gives to all, changed as the arm says."""
    with SEEDED:
        torch.manual_seed(seed)
        model = SpecXCiT(**backbone, conditioning=arm.conditioning)
        weights = model.state_dict()
        for name in [name for name in weights if name.endswith('.attn.qkv.weight')]:
            W, heads = weights[name], model.blocks[0].attn.num_heads
            if arm.start == 'W0 + C':
                weights[name] = Correction(W, **arm.initial, heads=heads)(W)
            elif arm.start == 'conditioned':
                weights[name] = conditioned_initialisation(W.unflatten(0, (3, -1)), 'QKV', heads).flatten(0, 1)
    write(path, serialize(dict(state_dict=weights)))


def write_config(path: Path, base: str, arm: Arm, seed: int, checkpoint: Path, arch: dict | None) -> None:
    """Write the config of a training: the base's, with an arm's conditioning and rate, a seed and initial weights."""
    backbone: dict = dict(
        conditioning=arm.conditioning and dict(arm.conditioning, _delete_=True),
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint.absolute())),
    )
    model = dict(backbone=backbone)
    if arch:
        backbone['arch'] = dict(arch, _delete_=True)
        if base == DETECTION:
            model['neck'] = dict(in_channels=[arch['dim']] * 4)
    lines = [f'_base_ = {str(find_config(base))!r}', f'model = {model!r}', f'randomness = dict(seed={seed})']
    if arm.rate != 1:
        # Of the blocks' projections alone: a classifier's class attention has the same names, and the longer one wins.
        keys = {'attn.qkv.weight': dict(lr_mult=arm.rate)}
        keys |= {f'cls_attn_blocks.{i}.attn.qkv.weight': dict(lr_mult=1.0) for i in range(2)}
        lines.append(f'optim_wrapper = dict(paramwise_cfg=dict(custom_keys={keys!r}))')
    write(path, '\n'.join(lines) + '\n')


def in_process(log: str, threads: int, command: str, argv: list[str]) -> None:
    """Be the process of a command."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(threads)
    sys.argv = ['spec-mmdet', command, *argv]
    from . import run

    run(command, argv)


class Chain:
    """What makes a log of a run.

    Args:
        size: of the experiment.
        data: the folder of the scenes.
        threads: of each process.
    """

    def __init__(self, size: Size, data: Path, threads: int) -> None:
        self.size, self.data, self.threads = size, data, threads
        cfg = Config.fromfile(find_config(DETECTION))
        self.backbone = {key: value for key, value in cfg.model.backbone.to_dict().items()
                         if key not in ('type', 'conditioning', 'init_cfg')}  # fmt: skip
        if size.arch:
            self.backbone['arch'] = size.arch
        # Its server has imported all that the commands need, so that each of them begins at once.
        os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'  # a process that has seen the GPU may not be forked
        self.context = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload([f'{__package__}.{name}' for name in ('pretrain', 'convert', 'train')])

    def step(self, work: Path, command: str, *argv: object) -> None:
        """Run a command, its output in the work directory.

        Raises:
            InputError: if it fails.
        """
        log = work.with_name(f'{work.name}.log')
        process = self.context.Process(target=in_process, args=(str(log), self.threads, command, [*map(str, argv)]))
        process.start()
        process.join()
        if process.exitcode:
            raise InputError(f'spec-mmdet {command} failed for {work.name}: {log} says why')

    def write_data(self, fashion_mnist: Path | None) -> None:
        """Write the scenes, of figures or of the garments in a folder."""
        size = self.size
        counts = ('--train', size.scenes, '--val', size.val, '--crops', size.crops)
        sizes = ('--size', size.pixels, '--crop-size', size.crop_pixels)
        garments = ('--fashion-mnist', fashion_mnist) if fashion_mnist else ()
        WORK.mkdir(parents=True, exist_ok=True)
        self.step(WORK / 'scenes', 'scenes', self.data, *counts, *sizes, *garments)

    def __call__(self, run: Run) -> dict:
        """Train and evaluate; returns the log."""
        work, begun = WORK / run.name, time.time()
        with replace_folder(work):
            work.mkdir(parents=True)
            log: dict = dict(arm=run.arm.name, seed=run.seed, conditioning=run.arm.conditioning)
            log['stage'] = 'screening' if run.seed == SCREENING_SEED else run.start
            backbone = work / 'start.pth'
            write_start(backbone, self.backbone, run.arm, run.seed)
            curves = {}
            if run.start == PRETRAINED:
                config = work / 'pretraining.py'
                write_config(config, PRETRAINING, run.arm, run.seed, backbone, self.size.arch)
                here = work / 'pretraining'
                self.step(work, 'pretrain', config, '--data', self.data / 'pretraining', '--work-dir', here,
                          '--image-size', self.size.crop_pixels)  # fmt: skip
                backbone = work / 'backbone.pth'
                self.step(work, 'convert', here / (here / 'last_checkpoint').read_text(), backbone)
                curves['pretraining'] = read_curves(here)
            config = work / 'detection.py'
            write_config(config, DETECTION, run.arm, run.seed, backbone, self.size.arch)
            self.step(work, 'train', config, '--data', self.data / 'detection', '--work-dir', work / 'detection',
                      '--image-size', self.size.pixels, '--no-check')  # fmt: skip
            curves['detection'] = read_curves(work / 'detection')
        return dict(
            log,
            ap={kind: curves['detection'][f'{kind} AP'][1][-1] for kind in ('box', 'mask')},
            curves={stage: {name: [xs, [float(f'{y:.4g}') for y in ys]] for name, (xs, ys) in own.items()}
                    for stage, own in curves.items()},
            seconds=round(time.time() - begun),
            commit=find_commit(Path(__file__)),
            device=processor('cuda' if torch.cuda.device_count() else 'cpu'),
        )  # fmt: skip


def stages(backbone: dict, logs: Callable[[], list[dict]]) -> Iterator[list[Run]]:
    """The runs of each stage, that of the next one known when the logs of the one before it are there."""
    yield [Run(arm, SCREENING_SEED) for arm in screened(backbone)]
    arms = final(backbone, logs())
    every = ((PRETRAINED, arms), (SCRATCH, from_scratch(arms)))
    # Seed by seed, so that an experiment cut short still compares all arms.
    yield [Run(arm, seed, start) for seed in SEEDS for start, own in every for arm in own]


def main(argv: Sequence[str] | None = None) -> None:
    options = parser('experiment', __doc__)
    options.add_argument('--size', choices=list(SIZES), default='cpu', help='of the data and the model: for two cores '
                         '(default), or for one GPU')  # fmt: skip
    options.add_argument('--jobs', type=int, help='trainings at a time (default: one a core, or one on a GPU)')
    options.add_argument('--fashion-mnist', type=Path, metavar='FOLDER', help='detect garments, as scenes has them')
    options.add_argument('--report', action='store_true', help='write the report of the runs that are there, and stop')
    args = options.parse_args(argv)
    kind = f'{args.size}-garments' if args.fashion_mnist else args.size
    folder, size = LOGS / kind, SIZES[args.size]
    jobs = args.jobs or (1 if torch.cuda.device_count() else os.cpu_count() or 1)
    data = WORK.with_name(f'experiment_data_{kind}')
    chain = Chain(size, data, max(1, (os.cpu_count() or 1) // jobs))

    def logs() -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted(folder.glob('*.json'))]

    if not args.report:

        def finish(run: Run) -> None:
            log = chain(run)
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / f'{run.name}.json', json.dumps(log))
            print(
                f'{run.name}: box AP {log["ap"]["box"]:.3f}, mask AP {log["ap"]["mask"]:.3f}, {log["seconds"]} s',
                flush=True,
            )

        for runs in stages(chain.backbone, logs):
            left = [run for run in runs if not (folder / f'{run.name}.json').is_file()]
            print(f'{len(runs)} runs, of which {len(runs) - len(left)} are there', flush=True)
            if left and not data.is_dir():
                chain.write_data(args.fashion_mnist)
            with ThreadPoolExecutor(jobs) as pool:
                for result in [pool.submit(finish, run) for run in left]:
                    result.result()
    print(f'wrote {study.write_report(LOGS, LOGS.with_suffix(".md"))}')
