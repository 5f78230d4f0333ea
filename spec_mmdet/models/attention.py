"""Cross-covariance attention (XCA): attention over channels, so its cost is linear in the number of tokens.

Two forms compute the same function: :func:`compute_xca` is the definition, and :func:`compute_xca_by_gram` is faster
for images, which have many more tokens than channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..conditioning import Correction, initialise_conditioned
from .products import compute_gram, get_product_dtype, is_plain, linear, scale_output

INIT_STD = 0.02  # of the reference's initial weight matrices
EPS = 1e-12  # lower bound of a channel's length over the tokens, as in F.normalize


def compute_xca(
    x: Tensor, W: Tensor, b: Tensor, W_out: Tensor, b_out: Tensor, temperature: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute XCA as XCiT defines it (arXiv 2106.09681, section 3.2).

    Per head, with tokens as rows and columns normalised to length one over the tokens,
    ``y = V softmax(temperature K^T Q)^T``: a d x d matrix mixes the channels of every token alike.

    Args:
        x: tokens, shape (B, N, C), as is the result.
        W, b: the query, key and value projections and their biases, shapes (3 C, C) and (3 C,).
        W_out, b_out: the output projection and its bias, shapes (C, C) and (C,).
        temperature: shape (heads, 1, 1).
        mask: 1 for tokens and 0 for padding, shape (B, N, 1). Padding does not affect the attention.
    """
    return linear(attend(linear(x, W, b), temperature, mask), W_out, b_out)


def attend(qkv: Tensor, temperature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute XCA from queries, keys and values, shape (B, N, 3 C), without projections: shape (B, N, C)."""
    if mask is not None:
        qkv = qkv * mask
    q, k, v = qkv.unflatten(2, (3, len(temperature), -1)).permute(2, 0, 3, 4, 1)  # each (B, heads, d, N)
    A = F.normalize(q, dim=-1, eps=EPS) @ F.normalize(k, dim=-1, eps=EPS).transpose(-2, -1)
    A = (A * temperature).softmax(dim=-1)
    return (A @ v).permute(0, 3, 1, 2).flatten(2)


class _Centred(torch.autograd.Function):
    """Mean of x over the tokens, Gram matrix of the centred tokens x_c = x - mean, and x_c in ``dtype``.

    Mean and Gram matrix are in float32 at least. Only x_c is kept for the backward pass, which needs one matrix
    product: x_c sums to zero, so the gradient of the Gram matrix does not reach the mean.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            mean = x.mean(dim=-2, dtype=exact)
            x = x - mean[..., None, :]
        else:
            mean = (x * mask).sum(dim=-2, dtype=exact) / mask.sum(dim=-2, dtype=exact)
            x = (x - mean[..., None, :]) * mask
        x = x.to(dtype)
        return mean, compute_gram(x), x

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(inputs[1], output[2])

    @staticmethod
    def backward(ctx, by_mean: Tensor, by_G: Tensor, by_x: Tensor) -> tuple[Tensor, None, None]:
        mask, x = ctx.saved_tensors
        if mask is not None:
            by_x = by_x * mask
        N = x.shape[-2] if mask is None else mask.sum(dim=-2)
        constant = (by_mean - by_x.sum(dim=-2, dtype=by_mean.dtype)) / N
        by_G = by_G + by_G.mT
        if x.dtype == torch.float16:  # avoids underflow of small gradients
            scale = 64 * torch.maximum(by_G.abs().amax(), constant.abs().amax()).clamp_min(torch.finfo(by_G.dtype).tiny)
            product = linear(x, (by_G / scale).to(x.dtype), (constant / scale).to(x.dtype))
            by_x = torch.addcmul(by_x.to(scale.dtype), product, scale)
        else:
            by_x = by_x + linear(x, by_G.to(x.dtype), constant.to(x.dtype))
        return (by_x if mask is None else by_x * mask).to(ctx.dtype), None, None


def compute_xca_by_gram(
    x: Tensor, W: Tensor, b: Tensor, W_out: Tensor, b_out: Tensor, temperature: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Compute the same as :func:`compute_xca` without the queries, keys and values of single tokens.

    The inner products and lengths of channels over the tokens follow from the Gram matrix G of the centred tokens and
    from the mean query and key: q^T k = W_q G W_k^T + N (W_q mean + b_q) (W_k mean + b_k)^T. (Without centring, the
    bias could cancel most of a quadratic form and half of its digits.) The attention A then merges the value and output
    projections into one C x C matrix M per image, and y = x M^T + m. Each token costs 2 C^2 multiplications instead of
    4 C^2 + 2 C d, and only the centred x is kept for the backward pass.

    Under autocast the centred tokens are in half precision, and G and all C x C matrices in float32.

    Arguments and shapes are those of :func:`compute_xca`; the mask excludes padding from G, the mean and N.
    """
    B, N, C = x.shape
    heads = len(temperature)
    dtype = get_product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        mean, G, x = _Centred.apply(x, mask, dtype)
        if mask is not None:
            N = mask.sum(dim=1).to(G.dtype)[..., None]  # (B, 1, 1)
        W, b, W_out, b_out, temperature = (t.to(G.dtype) for t in (W, b, W_out, b_out, temperature))
        W_qk, W_v = W.split((2 * C, C))
        b_qk, b_v = b.split((2 * C, C))
        WG = linear(G.mT, W_qk).mT  # W_qk G, shape (B, 2 C, C)
        means = (mean @ W_qk.T + b_qk).view(B, 2, C)  # of the queries and of the keys
        squares = (WG * W_qk).sum(dim=-1).view(B, 2, C) + N * means**2
        q_scale, k_scale = squares.clamp_min(EPS**2).rsqrt().view(B, 2, heads, -1).unbind(1)
        q_mean, k_mean = means.view(B, 2, heads, -1).unbind(1)
        A = WG[:, :C].view(B, heads, -1, C) @ W_qk[C:].view(heads, -1, C).mT
        A = A + (N * q_mean.flatten(1)[:, None]).view(q_mean.shape)[..., None] * k_mean[..., None, :]
        A = (A * q_scale[..., None] * k_scale[..., None, :] * temperature).softmax(dim=-1)
        M = linear((A @ W_v.view(heads, -1, C)).view(B, C, C).mT, W_out).mT  # W_out A W_v, shape (B, C, C)
        m = (A @ b_v.view(heads, -1, 1)).view(B, C) @ W_out.T + b_out + (M @ mean[..., None])[..., 0]
        return linear(x, M.to(dtype), m.to(dtype))


class XCA(nn.Module):
    """Cross-covariance attention with optional spectral conditioning.

    Args:
        dim: channels C.
        num_heads: heads; each owns C / num_heads channels.
        conditioning: None; or the arguments of :class:`~spec_mmdet.conditioning.Correction`, applied to each of the
            C x C projections W_Q, W_K, W_V (head h gets its own rows of the correction); or
            ``dict(type='initialisation')``, which only changes the initial weights.
        init_std: standard deviation of the initial weight matrices.
    """

    # Tokens per channel from which the Gram form is used; with fewer, its C x C matrices cost more than they save.
    gram_from = 2

    def __init__(self, dim: int, num_heads: int, conditioning: dict | None = None, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
        if conditioning is not None and conditioning.get('type') == 'initialisation':
            if len(conditioning) > 1:
                raise ValueError(f"conditioning: 'initialisation' accepts no other arguments, got {conditioning}")
            made = initialise_conditioned(self.qkv.weight.unflatten(0, (3, dim)), 'QKV', num_heads)
            self.qkv.weight.data = made.flatten(0, 1)
            conditioning = None
        # After the initialisation, because the exact correction depends on the weights.
        self.correction = None if conditioning is None else Correction(self.qkv.weight, **conditioning, heads=num_heads)

    @property
    def num_heads(self) -> int:
        return len(self.temperature)

    def forward(self, x: Tensor, gamma: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Apply attention over channels to tokens, shape (B, N, C).

        Args:
            gamma: LayerScale of the output, shape (C,); it scales the weights of the output projection.
            mask: as for :func:`compute_xca`.
        """
        if not is_plain(self.qkv, self.proj):
            qkv = self.qkv(x)
            if self.correction is not None:
                qkv = qkv + linear(x, self.correction.make_C(x.new_empty(qkv.shape[-1], x.shape[-1])))
            y = self.proj(attend(qkv, self.temperature, mask))
            return y if gamma is None else y * gamma
        W = self.qkv.weight if self.correction is None else self.correction(self.qkv.weight)
        W_out, b_out = (self.proj.weight, self.proj.bias) if gamma is None else scale_output(self.proj, gamma)
        xca = compute_xca_by_gram if x.shape[1] >= self.gram_from * x.shape[2] else compute_xca
        return xca(x, W, self.qkv.bias, W_out, b_out, self.temperature, mask)
