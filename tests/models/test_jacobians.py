"""Compare the reported Jacobians with autograd's, for complete layers in a running backbone."""

import pytest
import torch
from torch.func import functional_call, jacrev

from spec_mmdet import SpecXCiT
from spec_mmdet.models.jacobians import compute_jacobian_spectra

ARCH = dict(dim=16, depth=6, num_heads=2)


@pytest.mark.parametrize('conditioning', [None, dict(type='identity', lam=2.0), dict(type='svd')])
def test_layer_jacobians_equal_autograds(conditioning):
    model = SpecXCiT(ARCH, 16, conditioning)
    for name, parameter in model.named_parameters():
        if 'attn' in name:
            torch.nn.init.normal_(parameter, std=0.5)
    image = torch.randn(1, 3, 80, 96)  # 30 tokens
    spectra = compute_jacobian_spectra(model, image)
    assert [s.name for s in spectra] == [f'blocks.{i}.attn' for i in range(6)]
    one_head = compute_jacobian_spectra(model, image, heads=1)

    model = model.double().eval()
    for block, spectrum, sample in zip(model.blocks, spectra, one_head, strict=True):
        attention = block.attn
        inputs = []
        handle = attention.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            model(image.double())
        handle.remove()
        parameters = {k: p.detach() for k, p in attention.named_parameters()}
        parameters |= {'proj.weight': torch.eye(16).double(), 'proj.bias': torch.zeros(16).double()}

        def forward(weight, bias, attention=attention, parameters=parameters, x=inputs[0]):
            parameters = {**parameters, 'qkv.weight': weight, 'qkv.bias': bias}
            return functional_call(attention, parameters, (x,))[0]

        by_weight, by_bias = jacrev(forward, argnums=(0, 1))(parameters['qkv.weight'], parameters['qkv.bias'])
        J = torch.cat([by_weight.flatten(2), by_bias], dim=2)  # tokens, channels, weights and biases
        tokens = torch.cat([inputs[0][0], torch.ones(30, 1).double()], 1)
        rank = int(torch.linalg.matrix_rank(tokens))
        assert rank == 16  # of 17: the entries of LayerNorm's output add up to zero
        for found, rows, heads in ((spectrum, J, 2), (sample, J[:, :8], 1)):
            sigma = torch.linalg.svdvals(rows.flatten(0, 1))
            assert len(found.heads) == heads
            assert found.num_heads == 2
            assert found.sigma_max == pytest.approx(sigma[0].item(), rel=1e-6)
            assert found.sigma_min == pytest.approx(sigma[rank * 8 * heads - 1].item(), rel=1e-5)
            assert found.kappa == found.sigma_max / found.sigma_min


def test_the_model_is_unchanged():
    model = SpecXCiT(ARCH, 16, dict(type='identity'))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compute_jacobian_spectra(model, torch.randn(1, 3, 64, 64))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and value.dtype == before[key].dtype


def test_few_tokens_make_attention_nearly_singular_without_an_error():
    torch.manual_seed(0)
    model = SpecXCiT(dict(dim=96, depth=4, num_heads=2), 16)
    spectra = compute_jacobian_spectra(model, torch.randn(1, 3, 32, 32), heads=1)  # 4 tokens for 48 channels
    assert all(0 <= spectrum.sigma_min < 1e-2 < spectrum.sigma_max < 1e3 for spectrum in spectra)
