"""Exact Jacobians of attention with respect to its projections, their singular values, and the paper's bound.

The condition number that spectral conditioning (arXiv 2603.07162) is after is that of the Jacobian of attention by
W_Q, W_K and W_V. For softmax attention it is derived here anew (the paper's Theorem 3.3), with what holds of Theorem
3.4; for cross-covariance attention (XCA), which the paper does not treat, it is derived for the first time.

Everything here works on one head and one image, with the paper's orientation: tokens are the rows of X (N x D), and
projections multiply from the right (D x k, the transpose of what torch's Linear stores). A Jacobian's rows are the
entries of the output (N x k), its columns the entries of a projection, both in row-major order. A projection with a
bias is one with one more row, for tokens with a last entry of 1; so treated, these are the Jacobians by both.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from .correction import condition_number


def _softmax_jacobian(P: Tensor) -> Tensor:
    """Lam(p) = diag(p) - p p^T for each row p of P: shape (..., n) -> (..., n, n)."""
    return torch.diag_embed(P) - P[..., :, None] * P[..., None, :]


def attention_jacobian(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The Jacobians of softmax(scale X W_Q (X W_K)^T) X W_V by W_Q, W_K and W_V (Theorem 3.3).

    With p_n the n-th token's attention, Lam_n = diag(p_n) - p_n p_n^T and S_n = scale X^T Lam_n X (the covariance of
    the tokens under that attention), the n-th token's output changes by

        W_V^T S_n W_K dW_Q^T x_n,    W_V^T S_n dW_K W_Q^T x_n    and    dW_V^T X^T p_n.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k).
        W_K: shape (D, k).
        W_V: shape (D, v).
        scale: what the scores are multiplied by: 1 in the paper, 1 / sqrt(k) in most models.

    Returns:
        J_Q and J_K, shape (N v, D k), and J_V, shape (N v, D v).
    """
    Q, K, V = X @ W_Q, X @ W_K, X @ W_V
    P = (scale * Q @ K.T).softmax(dim=-1)
    B = scale * V.T @ _softmax_jacobian(P) @ X  # B_n = W_V^T S_n
    J_Q = torch.einsum('na,nvb->nvab', X, B @ W_K)
    J_K = torch.einsum('nva,nb->nvab', B, Q)
    J_V = torch.einsum('na,vb->nvab', P @ X, torch.eye(V.shape[1]).to(V))
    return tuple(J.flatten(2).flatten(0, 1) for J in (J_Q, J_K, J_V))


def theorem_3_4_bounds(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds on the condition numbers of J_Q, J_K and J_V, whose sum is the paper's Theorem 3.4.

        kappa(J_Q) <= kappa(X)^3 kappa(Lam) kappa(W_V) kappa(W_K)
        kappa(J_K) <= kappa(X)^3 kappa(Lam) kappa(W_V) kappa(W_Q)
        kappa(J_V) <= kappa(X) kappa(P)

    They hold for tokens that are linearly independent (N <= D) and square, regular projections. Each Lam_n sends
    the constant vector to zero, so kappa(Lam) is the largest eigenvalue of any Lam_n over the smallest of any but
    that one; and J_Q and J_K have rank N (N - 1), so their sigma_min is the singular value of that number.

    The paper states the sum as a bound on the condition number of the joint Jacobian [J_Q J_K J_V] of full rank. So
    it does not hold: for X = W_Q = W_K = I (2 x 2) and W_V = c I the sum is 4.2 whatever c is, but the condition
    number grows with c, 120 at c = 100. The outputs that J_Q and J_K cannot reach are left to J_V, which does not
    grow with W_V as they do. For what holds of the joint Jacobian see :func:`joint_bound`.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, D); and so are W_K and W_V.
        W_K: see above.
        W_V: see above.
        scale: what the scores are multiplied by.

    Returns:
        The three bounds, float64 scalars.
    """
    P = (scale * (X @ W_Q) @ (X @ W_K).T).softmax(dim=-1)
    lam = torch.linalg.eigvalsh(_softmax_jacobian(P.double()))
    kappa_lam = lam[:, -1].max() / lam[:, 1].min() if len(X) > 1 else torch.ones(())
    shared = condition_number(X) ** 3 * kappa_lam * condition_number(W_V)
    return shared * condition_number(W_K), shared * condition_number(W_Q), condition_number(X) * condition_number(P)


def joint_bound(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0) -> Tensor:
    """A bound on the condition number of the joint Jacobian [J_Q J_K J_V], where the paper's Theorem 3.4 fails.

        kappa(J) <= kappa(X) (scale |X|^2 |W_V| (|W_Q| + |W_K|) / 2 + |P|) / sigma_min(P)

    with spectral norms, for linearly independent tokens (N <= D) and a regular P; projections of any width. Above are
    bounds on the norms of the three blocks, with |Lam_n| <= 1/2; below is sigma_min(J_V) >= sigma_min(P)
    sigma_min(X), which no further columns can lessen. It speaks of the projections' norms, not of their condition
    numbers: those are in the bounds on each block, :func:`theorem_3_4_bounds`.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k).
        W_K: shape (D, k).
        W_V: shape (D, v).
        scale: what the scores are multiplied by.

    Returns:
        The bound, a float64 scalar.
    """
    P = (scale * (X @ W_Q) @ (X @ W_K).T).softmax(dim=-1)
    norm = [torch.linalg.matrix_norm(M.double(), 2) for M in (X, W_Q, W_K, W_V, P)]
    scores = scale * norm[0] ** 2 * norm[3] * (norm[1] + norm[2]) / 2
    return condition_number(X) * (scores + norm[4]) / torch.linalg.svdvals(P.double())[-1]


def _xca_derivatives(X: Tensor, W_Q: Tensor, W_K: Tensor, temperature: float | Tensor) -> tuple[Tensor, ...]:
    """XCA's attention A, and how its scores s_ij = temperature q_i . k_j / (|q_i| |k_j|) change with W_Q and W_K.

    Returns:
        A, shape (k, k), and two tensors of shape (k, k, D): the gradient of s_ij by the i-th column of W_Q, and by the
        j-th column of W_K. It depends on no other column.
    """
    Q, K = X @ W_Q, X @ W_K
    q_norm, k_norm = Q.norm(dim=0), K.norm(dim=0)
    Q, K = Q / q_norm, K / k_norm
    cosines = Q.T @ K
    by_q = (temperature / q_norm)[:, None, None] * ((K.T @ X)[None] - cosines[:, :, None] * (Q.T @ X)[:, None])
    by_k = (temperature / k_norm)[None, :, None] * ((Q.T @ X)[:, None] - cosines[:, :, None] * (K.T @ X)[None])
    return (temperature * cosines).softmax(dim=-1), by_q, by_k


def xca_jacobian(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The Jacobians of cross-covariance attention by W_Q, W_K and W_V.

    Y = V A^T with A = softmax(temperature Q^T K), the columns of Q = X W_Q and K = X W_K scaled to length one. A
    channel's scores change only across its direction; with Lam_i = diag(a_i) - a_i a_i^T,

        dy_i = V Lam_i ds_i,    ds_ij = temperature (k_j - (q_i . k_j) q_i) . X dw_i / |X w_i|    for W_Q,

    likewise for W_K, whose j-th column moves the j-th score of every channel; and J_V = X (x) A.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k); and so are W_K and W_V.
        W_K: see above.
        W_V: see above.
        temperature: the head's.

    Returns:
        J_Q, J_K and J_V, shape (N k, D k) each.
    """
    A, by_q, by_k = _xca_derivatives(X, W_Q, W_K, temperature)
    V_Lam = X @ W_V @ _softmax_jacobian(A)
    J_Q = torch.einsum('ina,ib->niab', V_Lam @ by_q, torch.eye(len(A)).to(A))
    J_K = torch.einsum('inb,iba->niab', V_Lam, by_k)
    J_V = torch.einsum('na,ib->niab', X, A)
    return tuple(J.flatten(2).flatten(0, 1) for J in (J_Q, J_K, J_V))


def _largest_eigenvalue(operator: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite operator on tensors shaped like the one given."""

    def product(x: np.ndarray) -> np.ndarray:
        return operator(torch.as_tensor(x.reshape(like.shape)).to(like)).flatten().cpu().numpy()

    n = like.numel()
    if n < 8:  # too few for Lanczos steps
        return float(np.linalg.eigvalsh(np.stack([product(unit) for unit in np.eye(n)]))[-1])
    start = np.random.default_rng(0).standard_normal(n)  # the same figures every time
    symmetric = LinearOperator((n, n), matvec=product, dtype=np.float64)
    return float(eigsh(symmetric, k=1, which='LA', v0=start, tol=1e-9, return_eigenvectors=False)[0])


def xca_singular_values(
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
        X: tokens, shape (N, D), of any dtype; the rank is told by its precision, so float64 is best.
        W_Q: shape (D, k); and so are W_K and W_V.
        W_K: see above.
        W_V: see above.
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

    A, by_q, by_k = _xca_derivatives(X, W_Q, W_K, temperature)
    U, V = torch.linalg.qr(Vh[: len(s)] @ W_V)
    V_Lam = V @ _softmax_jacobian(A)
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
    if condition_number(A) * torch.finfo(A.dtype).eps > 1:
        return 0.0, sigma_max
    A_inv = torch.linalg.inv(A)
    EET = torch.einsum('ij,jakc,lk->ialc', A_inv, G.view(k, u, k, u), A_inv).reshape(k * u, k * u)
    eye = torch.eye(k * u).to(EET)
    L, failed = torch.linalg.cholesky_ex(eye + EET)
    if failed:  # by rounding, where A is nearly singular, as with few tokens: no eigenvalue of E E^T is negative
        squares, vectors = torch.linalg.eigh((EET + EET.T) / 2)
        shrink = eye - vectors / (1 + squares.clamp_min(0)) @ vectors.T
    else:
        shrink = eye - torch.cholesky_inverse(L)

    def gram_inverse(Y: Tensor) -> Tensor:
        Y = Y / s @ A_inv.T
        return (Y - U @ on_pairs(shrink, U.T @ Y)) / s @ A_inv

    return _largest_eigenvalue(gram_inverse, X.new_empty(len(s), k)) ** -0.5, sigma_max
