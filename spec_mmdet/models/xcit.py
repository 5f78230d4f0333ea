"""SpecXCiT: the XCiT backbone with spectrally conditioned attention, for MMDetection."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmdet.registry import MODELS
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..compat import has_hooks
from ..conditioning import require_same_conditioning
from ..errors import InputError
from .attention import INIT_STD, XCA
from .products import Conv2d, Upsample, get_product_dtype, is_eager_cpu, is_plain, linear, scale_output

# The reference implementation's architectures (arXiv 2106.09681); eta is the initial value of LayerScale.
ARCHS = {
    'nano_12': dict(dim=128, depth=12, num_heads=4, eta=1.0),
    'tiny_12': dict(dim=192, depth=12, num_heads=4, eta=1.0),
    'small_12': dict(dim=384, depth=12, num_heads=8, eta=1.0),
    'tiny_24': dict(dim=192, depth=24, num_heads=4, eta=1e-5),
    'small_24': dict(dim=384, depth=24, num_heads=8, eta=1e-5),
    'medium_24': dict(dim=512, depth=24, num_heads=8, eta=1e-5),
    'large_24': dict(dim=768, depth=24, num_heads=16, eta=1e-5),
}
STRIDES = (4, 8, 16, 32)  # of the reference's feature maps fpn1 to fpn4
MIN_IMAGE_SIZE = 32  # the coarsest level has stride 32


def gelu(x: Tensor, *layers: nn.Module) -> Tensor:
    """Apply GELU to the output of layers, in place unless a gradient or a hook may need the input."""
    kept = torch.is_grad_enabled() or any(map(has_hooks, layers))
    return F.gelu(x) if kept else torch.ops.aten.gelu_(x)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of images, shape (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_norm(norm_cfg: dict, channels: int) -> nn.Module:
    """Build a normalisation of images from an MMDetection config."""
    if norm_cfg.get('type') == 'LN':  # PyTorch's is over the last dimension
        norm_cfg = {**norm_cfg, 'type': ChannelNorm}
    return build_norm_layer(norm_cfg, channels)[1]


class ConvBN(nn.Sequential):
    """Stride-2 3x3 convolution and normalisation; in evaluation, batch normalisation is fused into the convolution."""

    def __init__(self, c_in: int, c_out: int, norm_cfg: dict) -> None:
        super().__init__(Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), build_norm(norm_cfg, c_out))

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self
        affine = getattr(bn, 'running_var', None) is not None and bn.weight is not None and conv.bias is None
        if bn.training or not affine or not is_plain(conv) or has_hooks(bn):
            return bn(conv(x))
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        W, b = conv.weight * scale[:, None, None, None], bn.bias - bn.running_mean * scale
        return F.conv2d(x, W, b, conv.stride, conv.padding)


class PatchEmbed(nn.Module):
    """Stem of stride-2 3x3 convolutions with normalisation: an image becomes a grid of tokens of ``dim`` channels."""

    def __init__(self, patch_size: int, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        convs = int(math.log2(patch_size))
        channels = [3] + [dim // 2**i for i in reversed(range(convs))]
        layers = [ConvBN(*ends, norm_cfg) for ends in zip(channels, channels[1:])]
        # The reference's names count the activations in between, which are not modules here.
        self.proj = nn.ModuleDict({str(2 * i): layer for i, layer in enumerate(layers)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Turn images, shape (B, 3, H, W), and an optional mask, shape (B, 1, H, W), into tokens and their mask."""
        layers = list(self.proj.values())
        for i, layer in enumerate(layers):
            x = layer(gelu(x, layers[i - 1], layers[i - 1][1]) if i else x)
            if mask is not None:
                # Padding stays zero, like the padding of a convolution at an image's edge.
                mask = mask[..., ::2, ::2]
                x = x * mask
        return x, mask


def encode_positions(n: int, hidden: int, temperature: float, last: Tensor) -> Tensor:
    """Compute ``hidden`` sines and cosines of n positions along a side: shape (B, hidden, n).

    Args:
        temperature: the longest period over the shortest.
        last: each image's last position, where the phase is 2 pi; float32, shape (B, 1).
    """
    # In float32 and in the reference's order of operations: its checkpoints were trained with these values.
    period = temperature ** (2 * (torch.arange(hidden, device=last.device) // 2).float() / hidden)
    position = torch.arange(1, n + 1, device=last.device).float()
    phase = (position / (last + 1e-6) * (2 * math.pi))[..., None] / period
    return torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=3).flatten(2).mT


def encode_grid(h: int, w: int, hidden: int, temperature: float, rows: Tensor, columns: Tensor) -> Tensor:
    """Encode each token's row and column in grids of ``rows`` x ``columns`` tokens: shape (B, 2 * hidden, h, w)."""
    down = encode_positions(h, hidden, temperature, rows)[..., None].expand(-1, -1, h, w)
    across = encode_positions(w, hidden, temperature, columns)[:, :, None].expand(-1, -1, h, w)
    return torch.cat([down, across], dim=1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in a later training
def compute_fourier_features(h: int, w: int, hidden: int, temperature: float, device: torch.device) -> Tensor:
    """Return the encoding of a grid of h x w tokens: float32, shape (1, 2 * hidden, h, w)."""
    # Converting h and w to Python floats would fix the image size of an exported graph.
    last = (torch.full((1, 1), n, dtype=torch.float32, device=device) for n in (h, w))
    return encode_grid(h, w, hidden, temperature, *last)


class PositionEncoding(nn.Module):
    """Fourier position encoding of a token grid, projected to ``dim`` channels."""

    def __init__(self, dim: int, hidden: int = 32, temperature: float = 10000.0) -> None:
        super().__init__()
        self.hidden, self.temperature = hidden, temperature
        self.token_projection = nn.Conv2d(2 * hidden, dim, 1)

    def forward(self, h: int, w: int, mask: Tensor | None = None) -> Tensor:
        """Encode a grid, shape (1, dim, h, w), or the one in each mask, shape (B, 1, h, w): 0 in the padding."""
        weight = self.token_projection.weight
        if mask is None:
            features = compute_fourier_features(h, w, self.hidden, self.temperature, weight.device)
        else:
            rows, columns = (first.float().sum(dim=1)[:, None] for first in (mask[:, 0, :, 0], mask[:, 0, 0]))
            features = encode_grid(h, w, self.hidden, self.temperature, rows, columns)
        encoded = self.token_projection(features.to(weight))
        return encoded if mask is None else encoded * mask


class LPI(nn.Module):
    """Local patch interaction between neighbouring tokens: two depthwise 3x3 convolutions."""

    def __init__(self, dim: int, norm_cfg: dict) -> None:
        super().__init__()
        # Registered before conv1: mmcv's fuse_conv_bn would fuse it into the preceding convolution, despite the GELU.
        self.bn = build_norm(norm_cfg, dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, h: int, w: int, gamma: Tensor, mask: Tensor | None) -> Tensor:
        """Mix neighbouring tokens, shape (B, h * w, C), and scale the channels by gamma."""
        if mask is not None:
            x = x * mask
            mask = mask.unflatten(1, (h, w)).permute(0, 3, 1, 2)
        # Tokens are a channels_last image, so neither conversion copies.
        x = x.unflatten(1, (h, w)).permute(0, 3, 1, 2)
        if torch.compiler.is_compiling():  # Inductor (of PyTorch 2.14) cannot order strides of unknown size
            x = x.contiguous()
        x = self.bn(gelu(self.conv1(x), self.conv1))
        if mask is not None:
            x = x * mask
        if not is_plain(self.conv2):
            return self.conv2(x).permute(0, 2, 3, 1).flatten(1, 2) * gamma
        x = F.conv2d(x, *scale_output(self.conv2, gamma), padding=1, groups=len(gamma))
        return x.permute(0, 2, 3, 1).flatten(1, 2)


class MLP(nn.Module):
    """Two linear layers with GELU in between; the hidden layer is four times as wide."""

    def __init__(self, dim: int, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Apply the MLP to tokens, shape (B, N, C), and scale the channels by gamma."""
        if not is_plain(self.fc1, self.fc2):
            return self.fc2(F.gelu(self.fc1(x))) * gamma
        W, b = scale_output(self.fc2, gamma)

        def mlp(x: Tensor) -> Tensor:
            return linear(gelu(linear(x, self.fc1.weight, self.fc1.bias)), W, b)

        if torch.is_grad_enabled() or not is_eager_cpu(x):
            return mlp(x)
        # With this many tokens at a time, the hidden layer fits in the cache.
        parts = [mlp(part) for part in x.split(4096, dim=1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Block(nn.Module):
    """XCiT block: attention over channels, local patch interaction and MLP, each residual with LayerScale."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        eta: float,
        conditioning: dict | None,
        drop_path: float,
        norm_cfg: dict,
        init_std: float = INIT_STD,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = XCA(dim, num_heads, conditioning, init_std)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)
        self.local_mp = LPI(dim, norm_cfg)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, init_std)
        self.gamma1 = nn.Parameter(torch.full((dim,), eta))
        self.gamma2 = nn.Parameter(torch.full((dim,), eta))
        self.gamma3 = nn.Parameter(torch.full((dim,), eta))
        self.drop_path = drop_path

    def add_residual(self, x: Tensor, gamma: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Add a branch's output, scaled by gamma, to ``x``; in training with stochastic depth."""
        factor = None  # of the branch's output
        if self.training and self.drop_path:
            # In float32 at least: 1 / 0.95 is 1.0547 in bfloat16.
            exact = torch.promote_types(x.dtype, torch.float32)
            factor = x.new_empty(len(x), 1, 1, dtype=exact).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            if len(x) == 1:  # cheaper: scales the branch's weights instead of its tokens
                gamma, factor = (gamma * factor.flatten()).to(gamma.dtype), None
        if get_product_dtype(x) == torch.float16:  # a weight times a gamma of 1e-5 would underflow
            largest = gamma.detach().abs().max().clamp_min(torch.finfo(gamma.dtype).tiny)
            gamma, factor = gamma / largest, largest if factor is None else factor * largest
        y = branch(gamma)
        return x + y if factor is None else torch.addcmul(x, y, factor).to(x.dtype)

    def forward(self, x: Tensor, h: int, w: int, mask: Tensor | None = None) -> Tensor:
        """Apply the block to tokens, shape (B, h * w, C); the mask is 0 in the padding, shape (B, h * w, 1)."""
        # The reference's parameter names number the branches 1, 3, 2.
        x = self.add_residual(x, self.gamma1, lambda gamma: self.attn(self.norm1(x), gamma, mask))
        x = self.add_residual(x, self.gamma3, lambda gamma: self.local_mp(self.norm3(x), h, w, gamma, mask))
        return self.add_residual(x, self.gamma2, lambda gamma: self.mlp(self.norm2(x), gamma))


@contextmanager
def _frozen_statistics(block: Block):
    """Freeze a block's running statistics while activation checkpointing runs it a second time."""
    bn = block.local_mp.bn
    momentum = getattr(bn, 'momentum', None)
    bn.momentum = 0.0
    try:
        yield
    finally:
        bn.momentum = momentum


def load_strictly(init_cfg: dict | list[dict] | None) -> dict | list[dict] | None:
    """Replace MMEngine's initialiser 'Pretrained', which skips mismatches, by our strict 'XCiTPretrained'."""
    if isinstance(init_cfg, dict):
        strict = init_cfg.get('type') in ('Pretrained', PretrainedInit)
        return {**init_cfg, 'type': 'XCiTPretrained'} if strict else init_cfg
    return init_cfg and [load_strictly(cfg) for cfg in init_cfg]


@MODELS.register_module()
class SpecXCiT(BaseModule):
    """XCiT (arXiv 2106.09681) with spectrally conditioned attention (arXiv 2603.07162), as a detection backbone.

    Parameter names are those of the reference implementation (facebookresearch/xcit, detection). Feature maps of
    strides 4, 8, 16 and 32, all ``dim`` channels wide, are made from the tokens after four of the blocks.

    Args:
        arch: a name in :data:`ARCHS`, or a dict of ``dim``, ``depth``, ``num_heads`` and, optionally, ``eta``.
        patch_size: 8 or 16 pixels.
        conditioning: None for plain XCiT; ``dict(type='identity', lam=10.0)``, the paper's; ``dict(type='identity',
            sigmas=2.0)``, with lambda relative to sigma_max of each initial projection; or ``dict(type='svd')``. With
            ``per_head=True`` each head is corrected separately; see :class:`~spec_mmdet.conditioning.Correction`. A
            state dict with a different conditioning is refused.
            ``dict(type='initialisation')`` only changes the initial weights (arXiv 2609.07086).
        norm_cfg: normalisation of the convolutions: BN (default), SyncBN, LN (over the channels) or GN. The statistics
            of GN include the padding, with or without a mask.
        drop_path_rate: stochastic depth, the same in every block.
        out_strides: strides of the feature maps, of 4, 8, 16 and 32; other maps are not made.
        out_indices: the block from which each map is made; by default 3, 5, 7, 11 of 12 blocks and 7, 11, 15, 23 of
            24, for strides 4, 8, 16, 32. Later blocks are not run.
        frozen_stages: -1 trains everything, 0 freezes stem and position encoding, n also the blocks up to the n-th of
            ``out_indices``. Frozen parts keep their normalisation statistics, too.
        contiguous: return contiguous maps instead of channels_last ones, for heads that call ``view`` (CenterNet).
        compile: None, or arguments of torch.nn.Module.compile for each block; use ``dict(dynamic=True)`` for images of
            many sizes.
        with_cp: recompute each block in the backward pass instead of keeping its activations.
        init_std: standard deviation of the blocks' initial weight matrices; by default the reference's, 0.02. For small
            models from scratch, ``dim ** -0.5`` is an alternative (docs/method/conditioning.md).
        init_cfg: MMEngine's, for instance ``dict(type='Pretrained', checkpoint=...)`` with a checkpoint in any layout
            of XCiT; by default the reference's initialisation.

    Raises:
        ValueError: if an argument is invalid.
    """

    def __init__(
        self,
        arch: str | dict = 'small_12',
        patch_size: int = 16,
        conditioning: dict | None = None,
        norm_cfg: dict | None = None,
        drop_path_rate: float = 0.0,
        out_strides: tuple[int, ...] = STRIDES,
        out_indices: tuple[int, ...] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        contiguous: bool = False,
        compile: dict | None = None,
        init_std: float = INIT_STD,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(load_strictly(init_cfg))
        if isinstance(arch, str):
            if arch not in ARCHS:
                raise ValueError(f'SpecXCiT: unknown arch {arch!r}; use one of {", ".join(ARCHS)}, or a dict of dims')
            arch = ARCHS[arch]
        if set(arch) | {'eta'} != {'dim', 'depth', 'num_heads', 'eta'}:
            raise ValueError(f'SpecXCiT: an arch dict has dim, depth, num_heads and optionally eta, got {sorted(arch)}')
        dim, depth, num_heads, eta = arch['dim'], arch['depth'], arch['num_heads'], arch.get('eta', 1.0)
        strides = [stride for stride in STRIDES if stride in out_strides]
        if out_indices is None:
            blocks = depth // 3 - 1, depth // 2 - 1, max(2 * depth // 3 - 1, depth // 2), depth - 1
            out_indices = tuple(block for block, stride in zip(blocks, STRIDES) if stride in strides)
        maps = len(strides)
        rising = len(out_indices) == maps and list(out_indices) == sorted({*out_indices} & {*range(depth)})
        for valid, rule in (
            (depth >= 4, f'depth must be at least 4, because features come from four blocks; got {depth}'),
            (
                dim % num_heads == dim % 8 == 0,
                f'dim must be a multiple of 8 and of num_heads, got {dim} and {num_heads}',
            ),
            (patch_size in (8, 16), f'patch_size must be 8 or 16, got {patch_size}'),
            (maps and strides == [*out_strides], f'out_strides must be some of {STRIDES}, rising; got {out_strides}'),
            (rising, f'out_indices must be {maps} rising block indices below {depth}, got {out_indices}'),
            (init_std > 0, f'init_std must be positive, got {init_std}'),
            (-1 <= frozen_stages <= maps, f'frozen_stages must be from -1 to {maps}, got {frozen_stages}'),
        ):
            if not valid:
                raise ValueError(f'SpecXCiT: {rule}')
        norm_cfg = norm_cfg or dict(type='BN')

        self.out_strides, self.out_indices = tuple(out_strides), tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.with_cp, self.contiguous, self.init_std = with_cp, contiguous, init_std
        self.patch_embed = PatchEmbed(patch_size, dim, norm_cfg)
        self.pos_embeder = PositionEncoding(dim)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, eta, conditioning, drop_path_rate, norm_cfg, init_std) for _ in range(depth)
        )
        up = nn.Sequential(Upsample(dim, dim, 2))
        if patch_size == 16:
            self.fpn1 = nn.Sequential(*up, build_norm(norm_cfg, dim), nn.GELU(), Upsample(dim, dim, 2))
            self.fpn2, self.fpn3, self.fpn4 = nn.Sequential(Upsample(dim, dim, 2)), nn.Identity(), nn.MaxPool2d(2, 2)
        else:
            self.fpn1, self.fpn2, self.fpn3, self.fpn4 = up, nn.Identity(), nn.MaxPool2d(2, 2), nn.MaxPool2d(4, 4)
        pyramid = {stride: f'fpn{i}' for i, stride in enumerate(STRIDES, 1)}
        self.pyramid = [pyramid[stride] for stride in strides]
        for stride in {*STRIDES} - {*strides}:
            delattr(self, pyramid[stride])
        for block in self.blocks if compile is not None else ():
            block.compile(**compile)
        unused = self.blocks[self.out_indices[-1] + 1 :]  # DDP raises an error for parameters without gradient
        for part in [*self._frozen_parts(), *unused]:
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps of a batch of images.

        Args:
            x: images, shape (B, 3, H, W), H and W at least 32. An optional fourth channel, which
                :class:`~spec_mmdet.models.padding.MaskedDataPreprocessor` adds, is 1 inside the images and 0 in the
                padding. With it, each image's features do not depend on the padding.

        Returns:
            A tensor of shape (B, dim, about H / s, about W / s) for each s in ``out_strides``.
        """
        if min(x.shape[-2:]) < MIN_IMAGE_SIZE:
            raise InputError(f'an image has a side below {MIN_IMAGE_SIZE} pixels after scaling, the least for SpecXCiT')
        maps = (getattr(self, fpn)(tap) for fpn, tap in zip(self.pyramid, self.compute_tokens(x)))
        return tuple(features.contiguous() if self.contiguous else features for features in maps)

    def compute_tokens(self, x: Tensor) -> list[Tensor]:
        """Return the tokens after each block in ``out_indices``, as maps of shape (B, dim, h, w), before rescaling."""
        x, mask = (x[:, :3], x[:, 3:]) if x.shape[1] == 4 else (x, None)
        # channels_last from the start, so that viewing pixels as tokens does not copy.
        x, mask = self.patch_embed(x.contiguous(memory_format=torch.channels_last), mask)
        h, w = x.shape[-2:]
        # As in the reference, under autocast the residual stream is in float32 and the branches in half precision.
        x = x.to(self.blocks[0].gamma1.dtype)
        x = x + self.pos_embeder(h, w, mask)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        if mask is not None:
            mask = mask.flatten(2).transpose(1, 2)
        taps = []
        for i, block in enumerate(self.blocks[: self.out_indices[-1] + 1]):
            if self.with_cp and x.requires_grad:
                contexts = partial(lambda block: (nullcontext(), _frozen_statistics(block)), block)
                x = checkpoint(block, x, h, w, mask, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x, h, w, mask)
            if i in self.out_indices:
                tokens = x if mask is None else x * mask
                taps.append(tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2))
        return taps

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        frozen_blocks = self.out_indices[self.frozen_stages - 1] + 1 if self.frozen_stages else 0
        return [self.patch_embed, self.pos_embeder, *self.blocks[:frozen_blocks]]

    def train(self, mode: bool = True) -> SpecXCiT:
        """Set the training mode, leaving frozen parts in evaluation mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Raised here, because MMEngine loads with strict=False and would only warn about a mismatch.
        weights = {k: v for k, v in state_dict.items() if k.startswith(prefix + 'blocks.')}
        if weights:
            require_same_conditioning(weights, self.state_dict())
        super()._load_from_state_dict(state_dict, prefix, *args)
