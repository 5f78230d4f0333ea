"""A classifier's accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from ..errors import InputError


@METRICS.register_module()
class TopK(BaseMetric):
    """Percentage of images whose class is among the k most probable ones: top1 and, for more than 5 classes, top5.

    Of classes with the same logit the first counts as more probable, as argmax has it.
    """

    default_prefix = 'accuracy'

    def process(self, data_batch: dict, data_samples: Sequence[torch.Tensor]) -> None:
        """Collect the rank of each image's class in a batch, from its 'targets' and logits of shape (classes,)."""
        for target, logits in zip(data_batch['targets'].tolist(), data_samples):
            if not logits.isfinite().all():
                raise InputError("the classifier's logits are not finite: its training has gone wrong")
            rank = int((logits > logits[target]).sum() + (logits[:target] == logits[target]).sum())
            self.results.append((len(logits), rank))

    def compute_metrics(self, results: list[tuple[int, int]]) -> dict[str, float]:
        """Compute the percentages over all images."""
        classes, ranks = np.array(results).T
        return {f'top{k}': 100 * float(np.mean(ranks < k)) for k in (1, 5) if k < classes[0]}
