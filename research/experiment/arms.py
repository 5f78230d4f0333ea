"""Arms and runs of the experiment: their initial weights, their configs, and the logs of finished runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from spec_mmdet.checkpoints.writing import serialize
from spec_mmdet.conditioning import Correction, Report, find_projections, initialise_conditioned
from spec_mmdet.errors import InputError
from spec_mmdet.files import write
from spec_mmdet.models.xcit import SpecXCiT

CONFIGS = Path(__file__).parents[1] / 'configs'
PRETRAINING, DETECTION = CONFIGS / 'experiment_pretraining.py', CONFIGS / 'experiment_maskrcnn.py'
SCREENED = (0.5, 1, 2, 5)  # times sigma_max of the initial weights
PAPER = 10.0  # lambda of the paper
SCREENING_SEED, SEEDS = 0, (1, 2, 3)
PRETRAINED, SCRATCH = 'pretrained', 'scratch'
MODERATE, LAMBDA_10 = 'moderate', 'lambda 10'  # the groups of arms


@dataclass(frozen=True)
class Size:
    """The size of the data and of the model.

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
    """One way of training.

    Attributes:
        name: shown in the report; finished runs are recognised by it.
        conditioning: of the backbone, in pretraining and in detection.
        start: the initial weights: 'W0'; 'W0 + C', once, with the C of ``initial``; 'conditioned' rows.
        initial: the conditioning that defines this C.
        rate: factor of the learning rate of the projections' weights.
        group: arms of one group share the estimate of their error: LAMBDA_10 if lambda is 10, at least at the start.
    """

    name: str
    conditioning: dict | None = None
    start: str = 'W0'
    initial: dict | None = None
    rate: float = 1.0
    group: str = MODERATE


def make_identity(lam: float, per_head: bool) -> dict:
    """Return the conditioning lambda I."""
    return dict(type='identity', lam=lam, per_head=per_head)


def list_screened_arms(backbone: dict) -> list[Arm]:
    """List the arms of the screening. The initial weights of ``backbone`` define sigma_max."""
    torch.manual_seed(SCREENING_SEED)
    model = SpecXCiT(**backbone)
    arms = [Arm('plain')]
    for per_head, form in ((False, 'full'), (True, 'per head')):
        sigma = max(row.sigma_max for row in Report(list(find_projections(model)), by_head=per_head))
        arms += [
            Arm(f'{form}, {times:g} sigma', make_identity(float(f'{times * sigma:.3g}'), per_head))
            for times in SCREENED
        ]
        arms.append(Arm(f'{form}, 10', make_identity(PAPER, per_head), group=LAMBDA_10))
    return arms


def choose_final_arms(backbone: dict, logs: Sequence[dict]) -> list[Arm]:
    """Choose the final arms from the logs of the screening: the best of each form, and lambda = 10.

    Raises:
        InputError: if the screening is not finished.
    """
    arms = list_screened_arms(backbone)
    by_arm = {log['arm']: log for log in logs if log['seed'] == SCREENING_SEED}
    if missing := [arm.name for arm in arms if arm.name not in by_arm]:
        raise InputError(f'the screening lacks {", ".join(missing)}')
    plain, *conditioned = arms
    chosen = [plain]
    for per_head in (False, True):
        of_form = [arm for arm in conditioned if arm.conditioning['per_head'] == per_head]
        best = max(of_form, key=lambda arm: by_arm[arm.name]['ap']['box'])
        chosen += [best] + [arm for arm in of_form if arm.group == LAMBDA_10 and arm is not best]
    full = make_identity(PAPER, False)
    rate = round(PAPER / (0.02 * math.sqrt(backbone['arch']['dim'])))
    return [
        *chosen,
        Arm('svd', dict(type='svd')),
        Arm('W0 + 10 I, decayed to 0', start='W0 + C', initial=full, group=LAMBDA_10),
        Arm('conditioned initialisation', start='conditioned'),
        Arm('full, 10, faster rows', full, rate=rate, group=LAMBDA_10),
    ]


def select_scratch_arms(arms: Sequence[Arm]) -> list[Arm]:
    """Select the final arms that are also trained without pretraining; they do not depend on the screening."""
    return [arm for arm in arms if arm.name in ('plain', 'full, 10', 'svd', 'conditioned initialisation')]


@dataclass(frozen=True)
class Run:
    """An arm with a seed, from a start: 'pretrained' or 'scratch'."""

    arm: Arm
    seed: int
    start: str = PRETRAINED

    @property
    def name(self) -> str:
        """The name of its files."""
        words = ''.join(c if c.isalnum() or c == '.' else ' ' for c in self.arm.name).split()
        return f'{"-".join(words)}_seed{self.seed}_{self.start}'


def plan_stages(backbone: dict, get_logs: Callable[[], list[dict]]) -> Iterator[list[Run]]:
    """Yield the runs of the screening and then, after its logs exist, the final runs."""
    yield [Run(arm, SCREENING_SEED) for arm in list_screened_arms(backbone)]
    arms = choose_final_arms(backbone, get_logs())
    stages = ((PRETRAINED, arms), (SCRATCH, select_scratch_arms(arms)))
    # Seed by seed, so that an interrupted experiment still compares all arms.
    yield [Run(arm, seed, start) for seed in SEEDS for start, some in stages for arm in some]


def read_logs(folder: Path) -> list[dict]:
    """Read the logs of the finished runs in a folder, in the order of their names."""
    logs = [json.loads(path.read_text(encoding='utf-8')) for path in sorted(folder.glob('*.json'))]
    for log in logs:
        # The first 50 logs do not contain the group of their arm.
        log.setdefault('group', LAMBDA_10 if '10' in log['arm'].replace(',', '').split() else MODERATE)
    return logs


SEEDING = Lock()  # trainings start in threads of one process, which share one random number generator


def write_start(path: Path, backbone: dict, arm: Arm, seed: int) -> None:
    """Write an arm's initial weights: the same for all arms of a seed, then changed as the arm specifies."""
    with SEEDING:
        torch.manual_seed(seed)
        model = SpecXCiT(**backbone, conditioning=arm.conditioning)
        weights = model.state_dict()
        for name in [name for name in weights if name.endswith('.attn.qkv.weight')]:
            W, heads = weights[name], model.blocks[0].attn.num_heads
            if arm.start == 'W0 + C':
                weights[name] = Correction(W, **arm.initial, heads=heads)(W)
            elif arm.start == 'conditioned':
                weights[name] = initialise_conditioned(W.unflatten(0, (3, -1)), 'QKV', heads).flatten(0, 1)
    write(path, serialize(dict(state_dict=weights)))


def write_config(path: Path, base: Path, arm: Arm, seed: int, checkpoint: Path, arch: dict | None) -> None:
    """Write a training's config: the base with an arm's conditioning and learning rate, a seed and initial weights."""
    backbone: dict = dict(
        conditioning=arm.conditioning and dict(arm.conditioning, _delete_=True),
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint.absolute())),
    )
    model = dict(backbone=backbone)
    if arch:
        backbone['arch'] = dict(arch, _delete_=True)
        if base == DETECTION:
            model['neck'] = dict(in_channels=[arch['dim']] * 4)
    lines = [f'_base_ = {str(base)!r}', f'model = {model!r}', f'randomness = dict(seed={seed})']
    if arm.rate != 1:
        # Only the blocks' projections: a classifier's class attention has the same names, and the longest key wins.
        keys = {'attn.qkv.weight': dict(lr_mult=arm.rate)}
        keys |= {f'cls_attn_blocks.{i}.attn.qkv.weight': dict(lr_mult=1.0) for i in range(2)}
        lines.append(f'optim_wrapper = dict(paramwise_cfg=dict(custom_keys={keys!r}))')
    write(path, '\n'.join(lines) + '\n')
