"""Top-k accuracy of classifiers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from ..errors import InputError


@METRICS.register_module()
class TopK(BaseMetric):
    """Metric: percentage of images whose class is among the k most probable ones, for k = 1 and (above 5 classes) 5.

    Ties go to the class with the smaller index, as for argmax.
    """

    default_prefix = 'accuracy'

    def process(self, data_batch: dict, data_samples: Sequence[torch.Tensor]) -> None:
        """Collect the rank of each image's class in a batch, from its 'targets' and logits of shape (classes,)."""
        for target, logits in zip(data_batch['targets'].tolist(), data_samples):
            if not logits.isfinite().all():
                raise InputError(
                    "the classifier's logits contain NaN or inf: its training diverged. Use an earlier checkpoint"
                )
            rank = int((logits > logits[target]).sum() + (logits[:target] == logits[target]).sum())
            self.results.append((len(logits), rank))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Compute the percentages over all images."""
        classes, ranks = np.array(results).T
        return {f'top{k}': 100 * float(np.mean(ranks < k)) for k in (1, 5) if k < classes[0]}
