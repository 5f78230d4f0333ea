"""Train Mask R-CNN in bfloat16 on a CPU: RoIAlign, suppression and losses get what autocast passes on."""

import copy

import pytest
import torch
from conftest import CONFIG
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config


def loss_and_gradients(model, batch, autocast=True):
    model.zero_grad()
    torch.manual_seed(1)  # of the samplers
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model(**copy.deepcopy(batch), mode='loss')
    total, _ = model.parse_losses(losses)
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_mask_rcnn_trains_and_predicts():
    cfg = Config.fromfile(CONFIG).model
    cfg.test_cfg.rcnn.score_thr = 0
    model = MODELS.build(cfg)
    model.neck.init_weights()
    data = demo_mm_inputs(2, (3, 96, 96), num_items=[3, 2], num_classes=3, with_mask=True)
    batch = model.data_preprocessor(copy.deepcopy(data), training=True)
    loss, gradients = loss_and_gradients(model.train(), batch, autocast=False)
    half_loss, half_gradients = loss_and_gradients(model, batch, autocast=True)
    assert half_gradients.isfinite().all() and half_gradients.dtype == torch.float32
    assert half_loss == pytest.approx(loss, rel=0.02)
    # The proposals differ slightly.
    assert torch.cosine_similarity(half_gradients, gradients, dim=0) > 0.97
    assert half_gradients.norm() == pytest.approx(gradients.norm().item(), rel=0.1)

    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        batch = model.eval().data_preprocessor(data)
        results = model(**batch, mode='predict')
    for result in results:
        found = result.pred_instances
        assert len(found) and found.bboxes.isfinite().all() and found.masks.shape == (len(found), 96, 96)
