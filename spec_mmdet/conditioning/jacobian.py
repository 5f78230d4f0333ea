"""Singular values of the exact Jacobian of cross-covariance attention (XCA) with respect to its projections.

The condition number that spectral conditioning (arXiv 2603.07162) is to improve is that of the Jacobian of attention
with respect to W_Q, W_K and W_V. The paper does not treat XCA; the formulas are derived here. Those of softmax
attention and the paper's bounds are in ``research/theorems.py``.

All functions work on one head and one image, in the paper's orientation: tokens are the rows of X (N x D), and
projections multiply from the right (D x k, the transpose of what torch's Linear stores). The rows of a Jacobian are the
entries of the output (N x k), its columns the entries of a projection, both in row-major order. A projection with a
bias is one with one more row, for tokens with a last entry of 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .correction import compute_condition_number


def compute_softmax_jacobian(P: Tensor) -> Tensor:
    """Lam(p) = diag(p) - p p^T for each row p of P: shape (..., n) -> (..., n, n)."""
    return torch.diag_embed(P) - P[..., :, None] * P[..., None, :]


def differentiate_xca_scores(X: Tensor, W_Q: Tensor, W_K: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """XCA's attention A, and how its scores s_ij = temperature q_i . k_j / (|q_i| |k_j|) change with W_Q and W_K.

    Returns:
        A, shape (k, k), and two tensors of shape (k, k, D): the gradients of s_ij with respect to the i-th column of
        W_Q and the j-th column of W_K. It depends on no other column.
    """
    Q, K = X @ W_Q, X @ W_K
    q_norm, k_norm = Q.norm(dim=0), K.norm(dim=0)
    Q, K = Q / q_norm, K / k_norm
    cosines = Q.T @ K
    by_q = (temperature / q_norm)[:, None, None] * ((K.T @ X)[None] - cosines[:, :, None] * (Q.T @ X)[:, None])
    by_k = (temperature / k_norm)[None, :, None] * ((Q.T @ X)[:, None] - cosines[:, :, None] * (K.T @ X)[None])
    return (temperature * cosines).softmax(dim=-1), by_q, by_k


def _largest_eigenvalue(operator: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Return the largest eigenvalue of a positive semidefinite operator on tensors shaped like the one given."""

    def product(x: np.ndarray) -> np.ndarray:
        return operator(torch.as_tensor(x.reshape(like.shape)).to(like)).flatten().cpu().numpy()

    n = like.numel()
    if n < 8:  # too few for Lanczos steps
        return float(np.linalg.eigvalsh(np.stack([product(unit) for unit in np.eye(n)]))[-1])
    start = np.random.default_rng(0).standard_normal(n)  # reproducible
    symmetric = LinearOperator((n, n), matvec=product, dtype=np.float64)
    return float(eigsh(symmetric, k=1, which='LA', v0=start, tol=1e-9, return_eigenvectors=False)[0])


def compute_xca_singular_values(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, temperature: float | Tensor = 1.0
) -> tuple[float, float]:
    """The extreme singular values of XCA's joint Jacobian J = [J_Q J_K J_V], exact, without building it.

    The outputs that J reaches are X times anything, so sigma_min is the singular value of number rank(X) k: the
    remaining ones are zero whatever the projections are. (LayerNorm makes X lose a rank; many tokens lose the rest.)

    With X = s V^T in an orthonormal basis of its range, J_V = (s (x) A) V^T and J J^T = (s (x) A) (I + E E^T)
    (s (x) A)^T, where E = (s (x) A)^-1 [J_Q J_K] lives on (V^T W_V) times k x k matrices: in at most k^2 of the rank(X)
    k dimensions, and free of X's small singular values. So a Cholesky factor of k^2 x k^2 inverts the whole without
    loss, and a few Lanczos steps (ARPACK's) on J J^T and on its inverse find both ends of the spectrum. For XCiT's
    heads, k = 48 channels and D = 384, where J has millions of entries a row, it takes about a second.

    Args:
        X: tokens, shape (N, D), of any dtype; use float64, because the rank is determined at this precision.
        W_Q, W_K, W_V: shape (D, k).
        temperature: the head's.

    Returns:
        sigma_min and sigma_max. The former has a relative error of up to about 1e-16 kappa(A)^2, and is 0 where A is
        singular to working precision.
    """
    tolerance = max(X.shape) * torch.finfo(X.dtype).eps
    X, W_Q, W_K, W_V = (M.detach().double() for M in (X, W_Q, W_K, W_V))
    temperature = torch.as_tensor(temperature).detach().double()
    # An orthonormal basis of X's range leaves J's singular values as they are; in it, X is the r x D matrix X.
    _, s, Vh = torch.linalg.svd(torch.linalg.qr(X, mode='r').R)
    s = s[s > tolerance * s[0]]
    X = s[:, None] * Vh[: len(s)]

    A, by_q, by_k = differentiate_xca_scores(X, W_Q, W_K, temperature)
    U, V = torch.linalg.qr(Vh[: len(s)] @ W_V)
    V_Lam = V @ compute_softmax_jacobian(A)
    # [J_Q J_K] = (s U (x) I) L, and G = L L^T, as a matrix over pairs of a channel and a column of U.
    k, u = len(A), U.shape[1]
    J_Q = V_Lam @ by_q
    G = torch.einsum('iab,bij,jcb->iajc', V_Lam, torch.einsum('iba,jba->bij', by_k, by_k), V_Lam)
    G[range(k), :, range(k)] += J_Q @ J_Q.mT
    G = G.reshape(k * u, k * u)
    s = s[:, None]

    def on_pairs(matrix: Tensor, Y: Tensor) -> Tensor:
        return (matrix @ Y.T.flatten()).view(k, u).T

    def gram(Y: Tensor) -> Tensor:
        return s**2 * Y @ A @ A.T + s * U @ on_pairs(G, U.T @ (s * Y))

    sigma_max = _largest_eigenvalue(gram, X.new_empty(len(s), k)) ** 0.5
    if compute_condition_number(A) * torch.finfo(A.dtype).eps > 1:
        return 0.0, sigma_max
    A_inv = torch.linalg.inv(A)
    EET = torch.einsum('ij,jakc,lk->ialc', A_inv, G.view(k, u, k, u), A_inv).reshape(k * u, k * u)
    eye = torch.eye(k * u).to(EET)
    L, failed = torch.linalg.cholesky_ex(eye + EET)
    if failed:  # rounding for a nearly singular A (few tokens): eigenvalues of E E^T are never negative
        squares, vectors = torch.linalg.eigh((EET + EET.T) / 2)
        shrink = eye - vectors / (1 + squares.clamp_min(0)) @ vectors.T
    else:
        shrink = eye - torch.cholesky_inverse(L)

    def gram_inverse(Y: Tensor) -> Tensor:
        Y = Y / s @ A_inv.T
        return (Y - U @ on_pairs(shrink, U.T @ Y)) / s @ A_inv

    return _largest_eigenvalue(gram_inverse, X.new_empty(len(s), k)) ** -0.5, sigma_max
