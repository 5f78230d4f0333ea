"""If the padding is known, an image's features do not depend on the images that it is batched with."""

import pytest
import torch
from conftest import ROOT
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from spec_mmdet import SpecXCiT
from spec_mmdet.models.attention import compute_xca, compute_xca_by_gram

ARCH = dict(dim=32, depth=6, num_heads=4)
SIZES = [(70, 101), (96, 64), (41, 130)]


def preprocessor(**changes):
    config = dict(type='MaskedDataPreprocessor', mean=[0.0] * 3, std=[1.0] * 3, pad_size_divisor=32)
    return MODELS.build(config | changes)


@pytest.mark.parametrize('form', ['plain', 'gram'])
@pytest.mark.parametrize('patch_size', [8, 16])
@pytest.mark.parametrize('conditioning', [None, dict(type='identity', lam=3.0)])
def test_features_do_not_depend_on_the_batch(form, patch_size, conditioning):
    model = SpecXCiT(ARCH, patch_size, conditioning).double().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith('lam'):
            tensor.copy_(torch.rand_like(tensor) + 0.5 if 'var' in name else 0.3 * torch.randn_like(tensor))
    for block in model.blocks:
        block.attn.gram_from = 0 if form == 'gram' else 1000
    images = [torch.randint(256, (3, *size)) for size in SIZES]
    inputs = preprocessor()(dict(inputs=images, data_samples=None))['inputs'].double()
    assert inputs.shape == (3, 4, 96, 160)
    with torch.no_grad():
        masked, unmasked = model.compute_tokens(inputs), model.compute_tokens(inputs[:, :3])
        for i, image in enumerate(images):
            for tap, told, untold in zip(model.compute_tokens(image[None].double()), masked, unmasked, strict=True):
                h, w = tap.shape[-2:]
                torch.testing.assert_close(told[i, :, :h, :w], tap[0], rtol=0, atol=1e-10)
                assert not told[i, :, h:].any() and not told[i, :, :, w:].any()
                assert (untold[i, :, :h, :w] - tap[0]).abs().max() > 1e-3


@pytest.mark.parametrize('form', [compute_xca, compute_xca_by_gram])
def test_padding_gets_no_gradient_through_the_attention(form):
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 9, 1, dtype=torch.float64)
    mask[0, 5:] = 0
    weights = [torch.randn(*shape, dtype=torch.float64) for shape in ((24, 8), (24,), (8, 8), (8,), (2, 1, 1))]
    y = form(x, *weights, mask)
    torch.testing.assert_close(y[:1, :5], form(x[:1, :5], *weights))
    (by_x,) = torch.autograd.grad(y[0, :5].sum(), x)
    assert not by_x[0, 5:].any() and by_x[0, :5].all()


def test_batch_augmentations_are_refused():
    with pytest.raises(ValueError, match='batch_augments'):
        preprocessor(batch_augments=[dict(type='BatchFixedSizePad', size=(128, 128))])


def test_a_masked_detector_trains(coco_mini):
    """Train with the option on real images of different sizes: a loss, and gradients for the complete backbone."""
    cfg = Config.fromfile(ROOT / 'benchmarks' / 'xcit_spec_overfit.py')
    cfg.merge_from_dict({'model.data_preprocessor.type': 'MaskedDataPreprocessor'})
    dataset = cfg.train_dataloader.dataset
    dataset.update(data_root=str(coco_mini), ann_file='annotations/instances_train2017.json', indices=4)
    dataset.data_prefix = dict(img='train2017/')
    dataset = DATASETS.build(dataset)
    model = MODELS.build(cfg.model)
    data = model.data_preprocessor(pseudo_collate([dataset[i] for i in range(2)]), True)
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.blocks.parameters())


@pytest.mark.parametrize('training', [True, False])
def test_a_forward_pass_never_waits_for_the_device(training):
    """Tensors on the meta device have no values, so that code that waits for a value raises."""
    model = SpecXCiT(ARCH, conditioning=dict(type='identity', lam=3.0), drop_path_rate=0.1).train(training).to('meta')
    images = [torch.empty(3, *size, dtype=torch.uint8, device='meta') for size in SIZES]
    levels = model(preprocessor().to('meta')(dict(inputs=images, data_samples=None), training)['inputs'])
    assert [level.shape[2:] for level in levels] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert all(level.is_meta for level in levels)
    sum(level.sum() for level in levels).backward()
