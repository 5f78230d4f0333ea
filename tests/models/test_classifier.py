"""Compare the classifier with timm's XCiT with the same weights."""

import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

from spec_mmdet.models.classifier import ImageClassifier

CLASSES = 7


def ours_of(name: str) -> str:
    """Return a parameter's name in the reference."""
    return name.replace('pos_embed.', 'pos_embeder.')


@pytest.mark.parametrize('arch', ['nano_12', 'tiny_12'])  # acts on one token in the reference
def test_features_logits_and_gradients_equal_timms(arch):
    theirs = timm.create_model(f'xcit_{arch}_p16_224', pretrained=False, num_classes=CLASSES).double().eval()
    for parameter in theirs.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    weights = {ours_of(name): value for name, value in theirs.state_dict().items()}
    for block in ('cls_attn_blocks.0.attn', 'cls_attn_blocks.1.attn'):
        for kind in ('weight', 'bias'):  # one layer in the reference, three in timm
            weights[f'{block}.qkv.{kind}'] = torch.cat([weights.pop(f'{block}.{role}.{kind}') for role in 'qkv'])
    backbone = dict(type='SpecXCiTClassifier', num_classes=CLASSES, arch=arch)
    ours = ImageClassifier(backbone, dict(mixup_alpha=0.8, cutmix_alpha=1.0), smoothing=0.1).double().eval()
    ours.backbone.load_state_dict(weights)

    images, targets = torch.randn(4, 3, 64, 96, dtype=torch.float64), torch.tensor([0, 3, 6, 3])
    features = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    torch.testing.assert_close(ours.backbone.compute_features(images), features, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours(images, targets), theirs(images), rtol=1e-10, atol=1e-10)

    mixing = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    np.random.seed(0)
    mixed, soft = mixing(images.clone(), targets)
    SoftTargetCrossEntropy()(theirs(mixed), soft).backward()
    np.random.seed(0)
    ours(images.clone(), targets, mode='loss')['loss'].backward()
    gradients = {name: parameter.grad for name, parameter in ours.backbone.named_parameters()}
    compared = 0
    for name, parameter in theirs.named_parameters():
        block, _, kind = name.rpartition('.')
        if name.startswith('cls_attn_blocks') and block[-2:] in ('.q', '.k', '.v'):
            expected = gradients[f'{block[:-2]}.qkv.{kind}'].chunk(3)['qkv'.index(block[-1])]
        else:
            expected = gradients[ours_of(name)]
        # Ours computes the loss from float32 logits, as under autocast.
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)
        compared += parameter.numel()
    assert compared == sum(gradient.numel() for gradient in gradients.values())
