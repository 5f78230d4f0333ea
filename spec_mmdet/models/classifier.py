"""Classifiers on SpecXCiT's blocks, for pretraining backbones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn

from .attention import INIT_STD
from .products import is_plain
from .xcit import MLP, SpecXCiT


class ClassAttention(nn.Module):
    """Softmax attention in which only the first token, the class token, is a query (arXiv 2103.17239)."""

    def __init__(self, dim: int, num_heads: int, init_std: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, gamma: Tensor | float = 1.0) -> Tensor:
        """Return the class token's output, shape (B, 1, C), scaled by gamma, for tokens of shape (B, N, C)."""
        C = x.shape[2]
        if is_plain(self.qkv):  # the image's tokens have no queries
            W_q, W_kv = self.qkv.weight.split((C, 2 * C))
            b_q, b_kv = self.qkv.bias.split((C, 2 * C))
            q, kv = F.linear(x[:, :1], W_q, b_q), F.linear(x, W_kv, b_kv)
        else:
            q, kv = self.qkv(x).split((C, 2 * C), dim=2)
        q = q[:, :1].unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(y) * gamma


class ClassAttentionBlock(nn.Module):
    """Class attention and an MLP for the class token, with LayerScale ``gamma``, shape (C,).

    With ``tokens_norm``, the second norm is applied to all tokens.
    """

    def __init__(self, gamma: Tensor, num_heads: int, tokens_norm: bool, init_std: float) -> None:
        super().__init__()
        dim = len(gamma)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads, init_std)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, init_std)
        self.gamma1, self.gamma2 = nn.Parameter(gamma.clone()), nn.Parameter(gamma.clone())
        self.tokens_norm = tokens_norm

    def forward(self, x: Tensor) -> Tensor:
        """Update the class token and the image's tokens, shape (B, 1 + N, C)."""
        # As in the reference, the image's tokens skip attention and MLP: their scaled norm is added, then they double.
        normed = self.norm1(x)
        token = x[:, :1] + self.attn(normed, self.gamma1)
        others = torch.addcmul(x[:, 1:], normed[:, 1:], self.gamma1)
        token = self.norm2(token)
        if self.tokens_norm:
            others = self.norm2(others)
        return torch.cat([token + self.mlp(token, self.gamma2), 2 * others], dim=1)


@MODELS.register_module()
class SpecXCiTClassifier(SpecXCiT):
    """XCiT's classifier: SpecXCiT's blocks, two of class attention, a norm and a linear head.

    Parameter names are those of the reference implementation (facebookresearch/xcit). The conditioning applies to the
    blocks, which a detector uses; class attention stays plain.

    Args:
        num_classes: number of classes.
        arch: as for :class:`SpecXCiT`.
        tokens_norm: whether the second norm of class attention is applied to all tokens; by default, as in the
            reference, in all archs except nano_12.
        **backbone: SpecXCiT's other arguments.
    """

    def __init__(
        self, num_classes: int, arch: str | dict = 'small_12', tokens_norm: bool | None = None, **backbone
    ) -> None:
        super().__init__(arch, **backbone)
        for fpn in self.pyramid:  # only detectors use them
            delattr(self, fpn)
        first = self.blocks[0]
        gamma, dim = first.gamma1.detach(), len(first.gamma1)
        tokens_norm = arch != 'nano_12' if tokens_norm is None else tokens_norm
        self.num_classes = num_classes
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=INIT_STD))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(gamma, first.attn.num_heads, tokens_norm, self.init_std) for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=self.init_std)
        nn.init.zeros_(self.head.bias)

    def compute_features(self, x: Tensor) -> Tensor:
        """Return the features before the head, shape (B, dim), of images of shape (B, 3, H, W)."""
        x = self.compute_tokens(x)[-1].flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (B, num_classes), of images of shape (B, 3, H, W)."""
        return self.head(self.compute_features(x))


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Classifier for MMEngine's runner, trained by cross-entropy with optional mixing of images by timm.

    Args:
        backbone: config of a :class:`SpecXCiTClassifier`.
        mixing: arguments of timm.data.Mixup; None disables mixing.
        smoothing: label smoothing.
        data_preprocessor, init_cfg: MMEngine's.
    """

    def __init__(
        self,
        backbone: dict,
        mixing: dict | None = None,
        smoothing: float = 0.0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.smoothing = smoothing
        self.mixing = None
        if mixing:
            from timm.data import Mixup

            self.mixing = Mixup(**mixing, label_smoothing=0.0, num_classes=self.backbone.num_classes)

    def forward(self, inputs: Tensor, targets: Tensor, mode: str = 'tensor') -> dict[str, Tensor] | Tensor:
        """Return the loss of a batch in mode 'loss', else its logits, shape (B, num_classes).

        ``inputs`` are normalised images, shape (B, 3, H, W); mixing needs an even B. Targets are classes, shape (B,).
        """
        if mode != 'loss':
            return self.backbone(inputs)
        if self.mixing:
            inputs, targets = self.mixing(inputs, targets)
        # With soft targets this is timm's SoftTargetCrossEntropy; smoothed after mixing, or before, is the same.
        loss = F.cross_entropy(self.backbone(inputs).float(), targets, label_smoothing=self.smoothing)
        return dict(loss=loss)
