"""Compute what lambda means for each architecture, and how far an optimiser can move a weight.

    python -m research.doses

Writes docs/results/doses.csv. Models have their initial weights (seed 0); numbers are medians over projections and
layers. Effective keys are the exponential of the entropy of an attention row, for 197 independent normalised tokens;
in XCA the keys of a query are the channels of its head. The command also prints the sum of the learning rates of
XCiT's schedules: Adam moves an entry of a weight by about this much at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import PARAM_SCHEDULERS
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from research.systems.bert import Bert
from research.systems.listops import ListOps
from research.systems.vit import ViT
from spec_mmdet.commands import command_line
from spec_mmdet.commands.common import make_parser
from spec_mmdet.conditioning import compute_sigma_max, find_projections
from spec_mmdet.conditioning.effects import count_effective_keys
from spec_mmdet.files import format_csv, write
from spec_mmdet.models.attention import XCA
from spec_mmdet.models.xcit import ARCHS

OUT = Path('docs/results/doses.csv')
LAM, SIGMAS, TOKENS, LAYERS = 10.0, 2.0, 197, 3
EXPERIMENT = dict(dim=96, num_heads=4)
# Iterations of an epoch: ImageNet with 1024 images in a step, COCO with 16 (117,266 images have objects).
SCHEDULES = {'pretrain_xcit_small_12_p16': 1_281_167 // 1024, 'xcit_maskrcnn': -(-117_266 // 16)}


def build_models() -> dict[str, nn.Module]:
    """Build a model of each architecture, or only attention layers of it."""
    import timm

    of_xcit = {f'XCiT {name}': arch for name, arch in ARCHS.items()} | {'XCiT of the experiment': EXPERIMENT}
    models: dict[str, nn.Module] = {
        name: nn.ModuleList(XCA(arch['dim'], arch['num_heads']) for _ in range(LAYERS))
        for name, arch in of_xcit.items()
    }
    for name in ('vit_small_patch16_224', 'vit_base_patch16_224'):
        models[name] = timm.create_model(name)
    return models | {f'{type(system).__name__} of the small systems': system.build_model()
                     for system in (ViT(), Bert(), ListOps())}  # fmt: skip


def count_effective_channels(W_Q: Tensor, W_K: Tensor, heads: int) -> float:
    """Compute the mean number of channels that a query of XCA attends to; the counterpart of count_effective_keys."""
    X = layer_norm(torch.randn(TOKENS, W_Q.shape[1], generator=torch.Generator().manual_seed(0)), W_Q.shape[1:])
    q, k = (normalize(X @ W.T, dim=0).T.unflatten(0, (heads, -1)) for W in (W_Q, W_K))
    log_P = (q @ k.mT).log_softmax(dim=-1)
    return (-(log_P.exp() * log_P).sum(dim=-1)).exp().mean().item()


@torch.no_grad()
def measure(name: str, model: nn.Module) -> dict[str, object]:
    """Measure an architecture; returns a row of the table."""
    whole, heads, weights = [], [], {}
    for projection in find_projections(model):
        W = projection.W.float()
        by_head = W.unflatten(1, (projection.heads, -1))
        whole += compute_sigma_max(W).tolist()
        heads += compute_sigma_max(by_head).flatten().tolist()
        weights.setdefault(id(projection.attention), {}).update(zip(projection.roles, W))
    W_Q, W_K = next(iter(weights.values()))['Q'], next(iter(weights.values()))['K']
    per_head = torch.eye(W_Q.shape[0] // projection.heads, W_Q.shape[1]).repeat(projection.heads, 1)
    is_xca = any(isinstance(module, XCA) for module in model.modules())
    count = count_effective_channels if is_xca else count_effective_keys
    keys = {
        'plain': 0 * per_head,
        f'{SIGMAS:g} sigma per head': SIGMAS * median(heads) * per_head,
        f'lambda {LAM:g}': LAM * torch.eye(*W_Q.shape),
    }
    return {
        'model': name,
        'sigma_max': f'{median(whole):.2f}',
        'sigma_max of a head': f'{median(heads):.2f}',
        f'lambda {LAM:g} in sigma_max': f'{LAM / median(whole):.0f}',
        f'lambda {LAM:g} in sigma_max of a head': f'{LAM / median(heads):.0f}',
        'keys': len(W_Q) // projection.heads if is_xca else TOKENS,
        **{f'effective keys, {arm}': f'{count(W_Q + C, W_K + C, projection.heads):.1f}' for arm, C in keys.items()},
    }


def sum_learning_rates(cfg: Config, length: int) -> float:
    """Sum the learning rates of all iterations of a training by epochs of ``length`` iterations."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for settings in map(ConfigDict.to_dict, cfg.param_scheduler):
        kind = PARAM_SCHEDULERS.get(settings.pop('type'))
        by_iteration = settings.pop('convert_to_iter_based', False)
        make = kind.build_iter_from_epoch if by_iteration else kind
        schedulers.append(make(optimizer, **settings, **(dict(epoch_length=length) if by_iteration else {})))
    total = 0.0
    for iteration in range(1, cfg.train_cfg.max_epochs * length + 1):
        total += optimizer.param_groups[0]['lr']
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % length == 0:
                scheduler.step()
    return total


def main(argv: Sequence[str] | None = None) -> None:
    make_parser('research.doses', __doc__, 'python -m').parse_args(argv)
    torch.manual_seed(0)
    rows = [measure(name, model) for name, model in build_models().items()]
    write(OUT, format_csv(rows))
    print(OUT.read_text())
    for name, length in SCHEDULES.items():
        print(f'{name}: sum of the learning rates '
              f'{sum_learning_rates(Config.fromfile(f"configs/{name}.py"), length):.0f}')  # fmt: skip


if __name__ == '__main__':
    with command_line():
        main()
