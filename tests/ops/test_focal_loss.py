"""Compare the focal losses, through mmcv's own functions, with their formulas and autograd."""

import mmcv.ops
import pytest
import torch
from plain import assert_same_with_gradients

CLASS_WEIGHTS = torch.rand(5, dtype=torch.float64)


def weights_of_rows(weight, target):
    """Return each row's weight: that of its class, or 1 without a class."""
    rows = [1.0 if weight is None or not 0 <= t < 5 else float(weight[t]) for t in target]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize('weight', [None, CLASS_WEIGHTS])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_sigmoid(weight, gamma):
    """A row whose target is -1, or the number of classes, is negative for each class, as in mmcv's kernels."""
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(-1, 6, (40,))

    def plain(logits):
        p = logits.sigmoid()
        is_target = target[:, None] == torch.arange(5)
        loss = torch.where(is_target, -0.3 * (1 - p) ** gamma * p.log(), -0.7 * p**gamma * (1 - p).log())
        return loss * weights_of_rows(weight, target)[:, None]

    loss = mmcv.ops.sigmoid_focal_loss
    assert_same_with_gradients(lambda x: loss(x, target, gamma, 0.3, weight, 'none'), plain, logits)
    assert_same_with_gradients(
        lambda x: loss(x, target, gamma, 0.3, weight, 'mean'), lambda x: plain(x).sum() / 40, logits
    )


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_gradients_of_saturated_examples_are_finite(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    for target in ([0, 1], [1, 0]):
        value = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor(target), gamma, 0.25, None, 'sum')
        assert value.isfinite() and torch.autograd.grad(value, logits)[0].isfinite().all()


def test_a_target_above_the_classes_is_an_error():
    with pytest.raises(ValueError, match='6.*5 classes'):
        mmcv.ops.sigmoid_focal_loss(torch.zeros(2, 5), torch.tensor([0, 6]))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_losses_of_logits_in_half_precision(dtype):
    logits, target = torch.randn(40, 5).to(dtype), torch.randint(5, (40,))
    half, single = logits.clone().requires_grad_(), logits.float().requires_grad_()
    values = [mmcv.ops.sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'mean') for x in (half, single)]
    assert values[0].dtype == dtype
    torch.testing.assert_close(values[0].float(), values[1], rtol=0.02, atol=0)
    gradients = [torch.autograd.grad(value, x)[0] for value, x in zip(values, (half, single))]
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=0.03, atol=1e-4)
