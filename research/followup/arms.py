"""The arms of the follow-up: what each one makes of the initial projections W of a model.

All arms of a seed start from the same W. Corrections are per head: sigma is the largest singular value of the head's
rows of one projection, and C is 2 sigma times the rectangular identity.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from research.systems.runs import System
from spec_mmdet.conditioning import Projection, compute_sigma_max, find_projections

STD = 0.02  # with which both systems draw their weight matrices


@dataclass(frozen=True)
class Arm:
    """Change that an arm makes to the initial weights W.

    Attributes:
        name: identifies the arm in logs and tables.
        sigmas: size of C in units of sigma; 0 for no C.
        random: C is not the identity, but a random semi-orthogonal matrix of the same size, drawn for each head.
        use: what the training starts from: 'W + C'; 'size', W scaled to the Frobenius norm of W + C, projection by
            projection; 'direction', W + C scaled to the norm of W.
        wide: W is drawn with the standard deviation 1 / sqrt(width) instead of 0.02, as are all other weight matrices.
    """

    name: str
    sigmas: float = 0.0
    random: bool = False
    use: str = 'W + C'
    wide: bool = False


PLAIN = Arm('plain')
CONDITIONED = Arm('2 sigma', 2.0)
LARGER = Arm('larger', 2.0, use='size')
RESCALED = Arm('rescaled', 2.0, use='direction')
RANDOM = Arm('random', 2.0, random=True)
DOSED = Arm('18.9 sigma', 18.9)  # lambda = 10 in XCiT-S, in units of a head's sigma
WIDE = Arm('wide plain', wide=True)


def widen(arm: Arm) -> Arm:
    """Return the arm on weights with the standard deviation 1 / sqrt(width)."""
    return arm if arm.wide else dataclasses.replace(arm, name=f'wide {arm.name}', wide=True)


class Targets(dict[nn.Parameter, Tensor]):
    """C of the weights that hold W + C: the values towards which weight decay pulls them."""

    def keep_fixed(self, optimizer: torch.optim.AdamW) -> None:
        """Make weight decay pull W + C towards C.

        AdamW multiplies W + C by 1 - lr * decay; adding lr * decay * C after the step leaves C whole.
        """

        def put_back(optimizer: torch.optim.Optimizer, *_: object) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for weight in group['params']:
                        if weight in self:
                            weight.add_(self[weight].to(weight.device), alpha=group['lr'] * group['weight_decay'])

        optimizer.register_step_post_hook(put_back)


def select_projections(model: nn.Module) -> Iterator[Projection]:
    """Yield the projections that the arms change: not those of XCiT's class attention, which no detector has."""
    return (found for found in find_projections(model) if 'cls_attn' not in found.name)


def make_C(W: Tensor, arm: Arm) -> Tensor:
    """Return C for matrices of heads, shape (..., d, k)."""
    eyes = torch.eye(*W.shape[-2:]).expand(W.shape)
    if arm.random:
        eyes = torch.stack([nn.init.orthogonal_(torch.empty_like(M)) for M in W.flatten(0, -3)]).view_as(W)
    return arm.sigmas * compute_sigma_max(W)[..., None, None].to(W) * eyes


@torch.no_grad()
def build_initial_model(system: System, arm: Arm, seed: int) -> tuple[nn.Module, Targets, None]:
    """Build the model that a run starts from, and the targets of its weight decay."""
    torch.manual_seed(seed)
    model = system.build_model()
    if arm.wide:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and module.weight.std() < 1.5 * STD:
                module.weight *= 1 / (STD * math.sqrt(system.width))
    targets = Targets()
    if not arm.sigmas:
        return model, targets, None
    for projection in select_projections(model):
        weight = projection.weight
        W = weight.unflatten(0, (len(projection.roles), projection.heads, -1))
        C = make_C(W, arm)
        ratio = ((W + C).flatten(1).norm(dim=1) / W.flatten(1).norm(dim=1))[:, None, None, None]
        if arm.use == 'size':
            weight.copy_((ratio * W).view_as(weight))
            continue
        scale = 1 / ratio if arm.use == 'direction' else 1
        weight.copy_((scale * (W + C)).view_as(weight))
        targets[weight] = (scale * C).reshape(weight.shape)
    return model, targets, None
