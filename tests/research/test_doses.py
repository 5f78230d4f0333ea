"""Test the table of doses: against NumPy, the entropy by its definition, and closed forms of the schedules."""

import csv

import numpy as np
import pytest
import torch
from mmengine.config import Config

from research.doses import LAM, OUT, SCHEDULES, count_effective_channels, measure, sum_learning_rates
from spec_mmdet.models.attention import XCA


def test_row_of_an_architecture():
    torch.manual_seed(0)
    model = torch.nn.ModuleList([XCA(48, 4)])
    row = measure('x', model)
    W = model[0].qkv.weight.detach().double().numpy().reshape(3, 48, 48)
    sigma, of_head = (np.median([np.linalg.norm(M, 2) for M in A]) for A in (W, W.reshape(12, 12, 48)))
    assert float(row['sigma_max']) == pytest.approx(sigma, abs=0.006)
    assert float(row['lambda 10 in sigma_max of a head']) == round(LAM / of_head)
    X = torch.randn(197, 48, generator=torch.Generator().manual_seed(0)).double()
    X = (X - X.mean(1, keepdim=True)) / X.std(1, correction=0, keepdim=True)
    counts = []
    for h in range(4):
        q, k = (X.numpy() @ M[12 * h : 12 * h + 12].T for M in W[:2])
        A = np.exp((q / np.linalg.norm(q, axis=0)).T @ (k / np.linalg.norm(k, axis=0)))
        A /= A.sum(1, keepdims=True)
        counts += np.exp(-(A * np.log(A)).sum(1)).tolist()
    W_Q, W_K = torch.from_numpy(W[:2]).float()
    assert count_effective_channels(W_Q, W_K, 4) == pytest.approx(np.mean(counts), rel=1e-3)


def test_sum_of_learning_rates():
    """COCO: full until epoch 27, a tenth until 33, a hundredth after; ImageNet: half a cosine over the warm-up."""
    imagenet, coco = (Config.fromfile(f'configs/{name}.py') for name in SCHEDULES)
    length = 1000
    assert sum_learning_rates(coco, length) == pytest.approx(1e-4 * length * (27 + 0.6 + 0.03), rel=0.02)
    assert sum_learning_rates(imagenet, 10) == pytest.approx(10 * 400 * (1e-3 + 1e-5) / 2, rel=0.02)


def test_table_is_that_of_the_command():
    rows = list(csv.DictReader(OUT.read_text().splitlines()))
    torch.manual_seed(0)
    again = measure('XCiT nano_12', torch.nn.ModuleList(XCA(128, 4) for _ in range(3)))
    assert rows[0] == {key: str(value) for key, value in again.items()}
