"""Conditioned initialisation (arXiv 2609.07086): well-conditioned weights to start from, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def initialise_conditioned(W: Tensor, roles: str, heads: int) -> Tensor:
    """Initial projections in which the matrix of each head has condition number 1; nothing else is stored.

    Each head's Q and K are independent random semi-orthogonal matrices, each head's V is the rectangular identity.
    (With the identity for Q and K as well, each token would attend to itself alone.)

    Args:
        W: gives shape, dtype and device: (len(roles), heads * d, k), in torch's layout.
        roles: the kinds of projections in order, for instance 'QKV' or 'K'.
        heads: number of heads of each.

    Raises:
        ValueError: on rows that the heads do not divide.
    """
    if W.shape[1] % heads:
        raise ValueError(f'conditioning: {W.shape[1]} rows cannot be divided into {heads} heads')
    made = torch.empty(len(roles), heads, W.shape[1] // heads, W.shape[2], device=W.device)
    for role, projection in zip(roles, made):
        for head in projection:
            nn.init.eye_(head) if role == 'V' else nn.init.orthogonal_(head)
    return made.flatten(1, 2).to(W.dtype)
