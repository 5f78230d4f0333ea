"""Compute Jacobians of attention, and bounds on their condition numbers (arXiv 2603.07162, Theorems 3.3 and 3.4).

The orientation is that of :mod:`spec_mmdet.conditioning.jacobian`. The Jacobian of softmax attention is derived
independently, and Theorem 3.4 is corrected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_mmdet.conditioning import compute_condition_number
from spec_mmdet.conditioning.jacobian import compute_softmax_jacobian, differentiate_xca_scores


def attention_jacobian(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Jacobians of softmax(scale X W_Q (X W_K)^T) X W_V w.r.t. W_Q, W_K and W_V (Theorem 3.3).

    With p_n the n-th token's attention, Lam_n = diag(p_n) - p_n p_n^T and S_n = scale X^T Lam_n X (the covariance of
    the tokens under that attention), the n-th token's output changes by

        W_V^T S_n W_K dW_Q^T x_n,    W_V^T S_n dW_K W_Q^T x_n    and    dW_V^T X^T p_n.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k).
        W_K: shape (D, k).
        W_V: shape (D, v).
        scale: factor of the scores: 1 in the paper, 1 / sqrt(k) in most models.

    Returns:
        J_Q and J_K, shape (N v, D k), and J_V, shape (N v, D v).
    """
    Q, K, V = X @ W_Q, X @ W_K, X @ W_V
    P = (scale * Q @ K.T).softmax(dim=-1)
    B = scale * V.T @ compute_softmax_jacobian(P) @ X  # B_n = W_V^T S_n
    J_Q = torch.einsum('na,nvb->nvab', X, B @ W_K)
    J_K = torch.einsum('nva,nb->nvab', B, Q)
    J_V = torch.einsum('na,vb->nvab', P @ X, torch.eye(V.shape[1]).to(V))
    return tuple(J.flatten(2).flatten(0, 1) for J in (J_Q, J_K, J_V))


def theorem_3_4_bounds(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute bounds on the condition numbers of J_Q, J_K and J_V; their sum is the paper's Theorem 3.4.

        kappa(J_Q) <= kappa(X)^3 kappa(Lam) kappa(W_V) kappa(W_K)
        kappa(J_K) <= kappa(X)^3 kappa(Lam) kappa(W_V) kappa(W_Q)
        kappa(J_V) <= kappa(X) kappa(P)

    They hold for tokens that are linearly independent (N <= D) and square, regular projections. Each Lam_n sends
    the constant vector to zero, so kappa(Lam) is the largest eigenvalue of any Lam_n divided by the smallest except
    that zero. J_Q and J_K have rank N (N - 1), so their sigma_min is the singular value of that index.

    The paper states the sum as a bound on the condition number of the joint Jacobian [J_Q J_K J_V] of full rank. This
    does not hold: for X = W_Q = W_K = I (2 x 2) and W_V = c I the sum is 4.2 for any c, but the condition
    number grows with c, to 120 at c = 100. Only J_V reaches the outputs that J_Q and J_K cannot reach, and it does not
    grow with W_V as they do. :func:`joint_bound` bounds the joint Jacobian.

    Args:
        W_Q: shape (D, D), like W_K and W_V.
        W_Q: shape (D, D); and so are W_K and W_V.
        W_K: see W_Q.
        W_V: see W_Q.
        scale: factor of the scores.

    Returns:
        The three bounds, float64 scalars.
    """
    P = (scale * (X @ W_Q) @ (X @ W_K).T).softmax(dim=-1)
    lam = torch.linalg.eigvalsh(compute_softmax_jacobian(P.double()))
    kappa_lam = lam[:, -1].max() / lam[:, 1].min() if len(X) > 1 else torch.ones(())
    shared = compute_condition_number(X) ** 3 * kappa_lam * compute_condition_number(W_V)
    return (
        shared * compute_condition_number(W_K),
        shared * compute_condition_number(W_Q),
        compute_condition_number(X) * compute_condition_number(P),
    )


def joint_bound(X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, scale: float = 1.0) -> Tensor:
    """Compute a bound on the condition number of the joint Jacobian [J_Q J_K J_V], where Theorem 3.4 fails.

        kappa(J) <= kappa(X) (scale |X|^2 |W_V| (|W_Q| + |W_K|) / 2 + |P|) / sigma_min(P)

    with spectral norms, for linearly independent tokens (N <= D) and a regular P; projections of any width. The
    numerator bounds the norms of the three blocks, with |Lam_n| <= 1/2. sigma_min(J_V) >= sigma_min(P) sigma_min(X),
    which further columns cannot reduce. The bound contains the projections' norms, not their condition
    numbers; the bounds on each block, :func:`theorem_3_4_bounds`, contain those.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k).
        W_K: shape (D, k).
        W_V: shape (D, v).
        scale: factor of the scores.

    Returns:
        The bound, a float64 scalar.
    """
    P = (scale * (X @ W_Q) @ (X @ W_K).T).softmax(dim=-1)
    norm = [torch.linalg.matrix_norm(M.double(), 2) for M in (X, W_Q, W_K, W_V, P)]
    scores = scale * norm[0] ** 2 * norm[3] * (norm[1] + norm[2]) / 2
    return compute_condition_number(X) * (scores + norm[4]) / torch.linalg.svdvals(P.double())[-1]


def xca_jacobian(
    X: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Jacobians of cross-covariance attention with respect to W_Q, W_K and W_V.

    Y = V A^T with A = softmax(temperature Q^T K), the columns of Q = X W_Q and K = X W_K scaled to length one. A
    channel's scores change only perpendicularly to its direction. With Lam_i = diag(a_i) - a_i a_i^T,

        dy_i = V Lam_i ds_i,    ds_ij = temperature (k_j - (q_i . k_j) q_i) . X dw_i / |X w_i|    for W_Q,

    likewise for W_K, whose j-th column moves the j-th score of every channel; and J_V = X (x) A.

    Args:
        X: tokens, shape (N, D).
        W_Q: shape (D, k), like W_K and W_V.
        W_K: see W_Q.
        W_V: see W_Q.
        temperature: the head's.

    Returns:
        J_Q, J_K and J_V, shape (N k, D k) each.
    """
    A, by_q, by_k = differentiate_xca_scores(X, W_Q, W_K, temperature)
    V_Lam = X @ W_V @ compute_softmax_jacobian(A)
    J_Q = torch.einsum('ina,ib->niab', V_Lam @ by_q, torch.eye(len(A)).to(A))
    J_K = torch.einsum('inb,iba->niab', V_Lam, by_k)
    J_V = torch.einsum('na,ib->niab', X, A)
    return tuple(J.flatten(2).flatten(0, 1) for J in (J_Q, J_K, J_V))
