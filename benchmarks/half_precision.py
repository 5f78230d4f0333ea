"""Measure the errors of features and gradients in half precision, of SpecXCiT and of timm's XCiT with the same weights.

    python -m benchmarks.half_precision [--archs nano_12 ...] [--device cuda] [--out docs/results/half_precision.csv]

Each row compares one backbone under autocast with itself in float64 on the CPU: the relative error of the last block's
tokens, and the root mean square over the parameters of the relative errors of their gradients. LayerScale's gamma is
either the initial value of the architecture or, as after a training, drawn from 0.01 to 1 (uniform in its logarithm).
Without a GPU, the simulated one computes the products as tensor cores do: python tests/pretend_gpu.py
benchmarks/half_precision.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from pathlib import Path

import torch
from timm.models.xcit import Xcit
from torch import Tensor, nn

from spec_mmdet.checkpoints.layouts import to_layout
from spec_mmdet.models.xcit import ARCHS, SpecXCiT

DTYPES = dict(bf16=torch.bfloat16, fp16=torch.float16)
LOSS_SCALE = 2.0**16  # GradScaler's initial one


class TimmTokens(nn.Module):
    """timm's XCiT from images to the tokens after its last block."""

    def __init__(self, model: Xcit) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        # PyTorch 2.14's batch normalisation in evaluation mode computes wrong gradients on a CPU if its input is
        # contiguous and the gradient of its output is channels_last.
        x, (h, w) = self.model.patch_embed(images.contiguous(memory_format=torch.channels_last))
        x = x + self.model.pos_embed(len(x), h, w).flatten(2).transpose(1, 2)
        for block in self.model.blocks:
            x = block(x, h, w)
        return x


class OurTokens(nn.Module):
    """SpecXCiT from images to the tokens after its last block."""

    def __init__(self, model: SpecXCiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.compute_tokens(images)[-1].flatten(2).mT


def build_pair(arch: dict, gamma: str) -> dict[str, nn.Module]:
    """Build SpecXCiT and timm's XCiT with the same weights, in evaluation mode.

    Args:
        arch: dim, depth, num_heads and eta.
        gamma: 'initial', or 'trained' for values drawn from 0.01 to 1.
    """
    torch.manual_seed(0)
    ours = SpecXCiT(arch)
    if gamma == 'trained':
        for name, parameter in ours.named_parameters():
            if 'gamma' in name:
                parameter.data = 10 ** (-2 * torch.rand_like(parameter))
    shape = dict(embed_dim=arch['dim'], depth=arch['depth'], num_heads=arch['num_heads'])
    theirs = Xcit(patch_size=16, eta=arch['eta'], num_classes=0, **shape)
    theirs.load_state_dict(to_layout(ours.state_dict(), 'timm'), strict=False)
    return dict(ours=OurTokens(ours).eval(), timm=TimmTokens(theirs).eval())


def run(model: nn.Module, images: Tensor, by_tokens: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, dict]:
    """Return the tokens and the named gradients in float64, computed under autocast to ``dtype``, if given."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        tokens = model(images)
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0
    ((tokens.to(by_tokens.dtype) * by_tokens).mean() * scale).backward()
    gradients = {
        name.replace('pos_embed.', 'pos_embeder.'): parameter.grad.cpu().double() / scale
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return tokens.detach().cpu().double(), gradients


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact value."""
    return ((value - exact).norm() / exact.norm()).item()


def measure(arch: dict, gamma: str, dtypes: list[str], device: str, side: int | None = None) -> list[dict]:
    """Measure both backbones in half precision against float64.

    Args:
        arch: dim, depth, num_heads and eta.
        gamma: see :func:`build_pair`.
        dtypes: of DTYPES.
        device: computes the half precision.
        side: height and width of the image; the default is large enough for SpecXCiT's Gram form.

    Returns:
        A row for each backbone and dtype, with ``features`` and ``gradients``.
    """
    models = build_pair(arch, gamma)
    side = side or 16 * math.ceil(math.sqrt(2 * arch['dim']))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, side, side, generator=generator)
    by_tokens = torch.randn(1, (side // 16) ** 2, arch['dim'], generator=generator)
    tokens, gradients = run(copy.deepcopy(models['ours']).double(), images.double(), by_tokens.double(), None)
    rows = []
    for dtype in dtypes:
        for name, model in models.items():
            half = copy.deepcopy(model).to(device)
            own, own_gradients = run(half, images.to(device), by_tokens.to(device), DTYPES[dtype])
            errors = [relative_error(own_gradients[key], exact) for key, exact in gradients.items()]
            square = sum(error**2 for error in errors) / len(errors)
            row = dict(backbone=name, dtype=dtype, gamma=gamma, features=relative_error(own, tokens))
            rows.append({**row, 'gradients': math.sqrt(square)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('docs/results/half_precision.csv'))
    parser.add_argument('--archs', nargs='+', choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    rows = []
    for arch in args.archs:
        for gamma in ('initial', 'trained'):
            for row in measure(ARCHS[arch], gamma, list(DTYPES), args.device):
                rows.append({'arch': arch, **row})
                print(rows[-1], flush=True)
    with args.out.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows({k: f'{v:.2e}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == '__main__':
    main()
