"""Weights that are W + C against W and C stored apart: the same training, for any optimiser, and through tools."""

import copy

import pytest
import timm
import torch
from timm.optim import Lamb, Lookahead
from torch import nn
from torch.nn.utils import parametrize

from spec_mmdet import InputError
from spec_mmdet.conditioning import Correction, condition, find_projections


class Attention(nn.Module):
    """One layer of softmax attention, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(y))


def apart(model, **form):
    """Store W and C apart, as parametrizations: the method as in the paper."""
    model = copy.deepcopy(model)
    for projection in list(find_projections(model)):
        correction = Correction(projection.weight, **form, rows=projection.rows)
        parametrize.register_parametrization(projection.module, projection.tensor, correction)
    return model


def steps(*models_and_optimizers, count=100):
    """Train models alike, and yield after each step the largest difference of their weights from the first's."""
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for _ in range(count):
        x = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
        for model, optimizer in models_and_optimizers:

            def closure(model=model, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = (model(x) - x[..., :3].sin()).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        (first, _), *others = models_and_optimizers
        with torch.no_grad():
            for other, _ in others:
                for attribute in ('qkv', 'head'):
                    ours, theirs = getattr(first, attribute).weight, getattr(other, attribute).weight
                    largest = max(largest, (ours - theirs).abs().max().item())
    return largest


OPTIMIZERS = {
    'AdamW': lambda parameters, decay: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=decay),
    'Adam': lambda parameters, decay: torch.optim.Adam(parameters, lr=1e-2, weight_decay=decay),
    'SGD': lambda parameters, decay: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=decay),
    'NAdam': lambda parameters, decay: torch.optim.NAdam(parameters, lr=1e-2, weight_decay=decay),
    'LAMB': lambda parameters, decay: Lamb(parameters, lr=1e-2, weight_decay=decay, always_adapt=True),
}
FORMS = [dict(lam=3.0), dict(lam=2.0, per_head=True), dict(type='svd')]


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('name', ['AdamW', 'SGD'])
def test_without_weight_decay_a_fixed_correction_is_an_initialisation(name, form):
    model = Attention().double()
    reference = apart(model, **form)
    condition(model, **form)
    pairs = [(m, OPTIMIZERS[name](m.parameters(), 0.0)) for m in (model, reference)]
    assert steps(*pairs) < 1e-10


@pytest.mark.parametrize('form', FORMS, ids=str)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_plain_weights_follow_a_fixed_correction_under_any_optimiser(name, form):
    model = Attention().double()
    reference, forgotten = apart(model, **form), copy.deepcopy(model)
    report = condition(model, **form)
    condition(forgotten, **form)
    pairs = [(m, OPTIMIZERS[name](m.parameters(), 0.1)) for m in (model, reference, forgotten)]
    report.corrections.keep_fixed(pairs[0][1])
    start = copy.deepcopy(model.qkv.weight)
    assert steps(*pairs[:2]) < 1e-10
    assert (model.qkv.weight - start).abs().max() > 0.01
    assert steps(pairs[1], pairs[2]) > 1e-3  # without the call


def test_keep_fixed_makes_adamw_decay_towards_C():
    model = Attention().double()
    twin = copy.deepcopy(model)
    report = condition(model, lam=3.0)
    C = 3 * torch.eye(8).double().repeat(3, 1)
    with torch.no_grad():
        twin.qkv.weight += C
    pairs = [(m, OPTIMIZERS['AdamW'](m.parameters(), 0.1)) for m in (model, twin)]
    report.corrections.keep_fixed(pairs[0][1])

    @torch.no_grad()
    def pull(optimizer, args, kwargs):
        twin.qkv.weight.add_(C, alpha=1e-2 * 0.1)

    pairs[1][1].register_step_post_hook(pull)
    assert steps(*pairs) < 1e-10


def test_under_lamb_a_fixed_correction_differs_from_an_initialisation():
    """The norm of W + C scales its steps, not that of W, even without weight decay."""
    model = Attention().double()
    reference = apart(model, lam=3.0)
    report = condition(model, lam=3.0)
    pairs = [(m, OPTIMIZERS['LAMB'](m.parameters(), 0.0)) for m in (model, reference)]
    left = copy.deepcopy(pairs)
    assert steps(*left, count=10) > 1e-3
    report.corrections.keep_fixed(pairs[0][1])
    assert steps(*pairs) < 1e-10


@pytest.mark.parametrize('form', FORMS, ids=str)
def test_a_training_is_resumed(form, tmp_path):
    def begin(model, **how):
        corrections = condition(model, **form, **how).corrections
        optimizer = OPTIMIZERS['AdamW'](model.parameters(), 0.1)
        corrections.keep_fixed(optimizer)
        return model, optimizer, corrections

    through, optimizer, corrections = begin(Attention().double())
    steps((through, optimizer), count=5)
    saved = dict(model=through.state_dict(), optimizer=optimizer.state_dict(), corrections=corrections.state_dict())
    torch.save(saved, tmp_path / 'last.pth')
    resumed = Attention().double()
    saved = torch.load(tmp_path / 'last.pth')
    resumed.load_state_dict(saved['model'])
    resumed, its_optimizer, its_corrections = begin(resumed, keep_function=True)
    its_optimizer.load_state_dict(saved['optimizer'])
    its_corrections.load_state_dict(saved['corrections'])
    assert steps((through, optimizer), (resumed, its_optimizer), count=5) == 0


def test_keep_fixed_rejects_optimisers_without_or_with_used_weights():
    model, other = Attention(), Attention()
    corrections = condition(model, lam=3.0).corrections
    frozen = torch.optim.AdamW(model.head.parameters())
    with pytest.raises(InputError, match='no corrected weights'):
        corrections.keep_fixed(frozen)
    optimizer = torch.optim.AdamW(model.parameters())
    corrections.keep_fixed(optimizer)
    with pytest.raises(InputError, match='before'):
        corrections.keep_fixed(optimizer)
    with pytest.raises(InputError, match='not a torch.optim.Optimizer'):
        corrections.keep_fixed(object())
    for wrong in (condition(other, type='svd'), condition(Attention(), lam=3.0, per_head=True), condition(Attention())):
        with pytest.raises(InputError, match='this model'):
            corrections.load_state_dict(wrong.corrections.state_dict())


def test_an_optimiser_without_step_hooks_is_refused():
    model = Attention()
    corrections = condition(model, lam=3.0).corrections
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with pytest.raises(InputError, match='Lookahead '):
        corrections.keep_fixed(Lookahead(inner))
    before = {name: c.weight.detach() - c.C for name, c in corrections.items()}
    corrections.keep_fixed(inner)  # as the message says
    optimizer = Lookahead(inner, k=2)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(4):  # fast weights decay to 0.95, and the slow ones go half of the way back
        optimizer.step()
    for name, c in corrections.items():
        left = (c.weight.detach() - c.C) / before[name]
        assert torch.allclose(left, left.mean().expand_as(left), rtol=1e-3) and left.mean() < 0.9


def test_a_failed_step_does_not_remove_C_twice():
    model = Attention().double()
    reference = apart(model, lam=3.0)
    report = condition(model, lam=3.0)
    pairs = [(m, OPTIMIZERS['SGD'](m.parameters(), 0.1)) for m in (model, reference)]
    report.corrections.keep_fixed(pairs[0][1])

    def fail():
        raise KeyboardInterrupt

    for _, optimizer in pairs:
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(fail)
    assert not torch.allclose(model.qkv.weight, reference.qkv.weight)
    pairs[0][1].step(), pairs[1][1].step()
    assert (model.qkv.weight - reference.qkv.weight).abs().max() < 1e-12
    assert steps(*pairs, count=3) < 1e-10


def test_weights_without_gradient_are_unchanged_by_a_step():
    model = timm.create_model('vit_tiny_patch16_224', depth=2, img_size=32)
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    report = condition(model, type='svd')
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    report.corrections.keep_fixed(optimizer)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert torch.equal(model.blocks[0].attn.qkv.weight, before['blocks.0.attn.qkv.weight'])
    assert not torch.equal(model.blocks[1].attn.qkv.weight, before['blocks.1.attn.qkv.weight'])


def test_the_identity_form_stores_only_lambda():
    report = condition(Attention(), lam=2.0)
    assert {key: value.tolist() for key, value in report.corrections.state_dict().items()} == {'qkv.lam': 2.0}
    assert sum(b.numel() for c in report.corrections.values() for b in c.correction.buffers()) == 1
    assert isinstance(report.corrections['qkv'].correction, Correction)
