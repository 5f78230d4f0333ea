"""Parameters of configs' detectors and multiply-adds of their backbones, as a Markdown table.

    python tools/count_flops.py configs/xcit_maskrcnn.py [CONFIG ...]

Multiply-adds (what papers call FLOPs) are those of one image of 800 x 1216 through the backbone, its pyramid included.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import spec_mmdet  # noqa: F401  (before MMDetection: it provides mmcv's operators)

# isort: split
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from torch.utils.flop_counter import FlopCounterMode

from spec_mmdet.cli import command_line
from spec_mmdet.errors import InputError

SIZE = (800, 1216)


@torch.no_grad()
def count(cfg: Config) -> tuple[int, int, int]:
    """The parameters of a config's detector and of its backbone, and the multiply-adds of the backbone."""
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    parameters = (sum(p.numel() for p in part.parameters()) for part in (model, model.backbone))
    with FlopCounterMode(display=False) as counter:
        model.backbone(torch.randn(1, 3, *SIZE))
    return *parameters, counter.get_total_flops() // 2


@command_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', type=Path)
    configs = parser.parse_args().configs
    for path in configs:
        if not path.is_file():
            raise InputError(f'config {path}: no such file')
    MMLogger.get_current_instance().setLevel('ERROR')
    register_all_modules()
    print('| config | detector, M parameters | backbone, M parameters | backbone, G multiply-adds |\n|---|---|---|---|')
    for path in configs:
        parameters, own, multiply_adds = count(Config.fromfile(path))
        print(f'| `{path.name}` | {parameters / 1e6:.1f} | {own / 1e6:.1f} | {multiply_adds / 1e9:.0f} |', flush=True)


if __name__ == '__main__':
    main()
