"""Cross-covariance attention (XCA): attention over channels, so its cost is linear in the number of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conditioning import Correction


class XCA(nn.Module):
    """Cross-covariance attention (XCiT, arXiv 2106.09681, section 3.2) with optional spectral conditioning.

    Per head, with tokens as rows and columns normalised to length one over the tokens,
    ``y = V softmax(temperature K^T Q)^T``: a d x d matrix mixes the channels of every token alike.

    Args:
        dim: channels C.
        num_heads: heads; each owns C / num_heads channels.
        conditioning: None, or the arguments of :class:`~spec_mmdet.conditioning.Correction`, applied to each of the
            C x C projections W_Q, W_K, W_V (head h gets its own rows of the correction).
    """

    def __init__(self, dim: int, num_heads: int, conditioning: dict | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        # After the initialisation, because the exact correction depends on the weights.
        self.correction = None if conditioning is None else Correction(self.qkv.weight, **conditioning, heads=num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over channels.

        Args:
            x: tokens, shape (B, N, C).

        Returns:
            Tensor of the same shape.
        """
        W = self.qkv.weight if self.correction is None else self.correction(self.qkv.weight)
        qkv = F.linear(x, W, self.qkv.bias)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 4, 1)  # each (B, heads, d, N)
        A = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        A = (A * self.temperature).softmax(dim=-1)
        return self.proj((A @ v).permute(0, 3, 1, 2).flatten(2))
