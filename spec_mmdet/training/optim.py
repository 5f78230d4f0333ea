"""Layer-wise learning rates for fine-tuning."""

from __future__ import annotations

import re

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..errors import InputError
from ..models.xcit import SpecXCiT


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor with layer-wise decay of the learning rate, as in BEiT (arXiv 2106.08254).

    ``paramwise_cfg`` has a further key ``layer_decay``: the ratio of the learning rates of a block of SpecXCiT and the
    next block. Stem and position encoding precede the first block. The pyramid and the rest of the detector have the
    full learning rate. (MMDetection's LearningRateDecayOptimizerConstructor only supports ConvNeXt.)
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Add the parameters of a module to the groups; see MMEngine.

        Raises:
            InputError: if the detector's backbone is not a SpecXCiT.
        """
        backbone = getattr(module, 'backbone', None)
        if not prefix and not isinstance(backbone, SpecXCiT):
            raise InputError(
                f'LayerDecayConstructor, which --preset finetune uses, needs the backbone SpecXCiT, but the model has '
                f'{type(backbone).__name__}. Leave the preset out, and set a schedule with --epochs and --lr'
            )
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # called recursively for a part
            return
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        depth = len(backbone.blocks)
        for group in params:  # one for each parameter
            layer = find_layer(names[id(group['params'][0])], depth)
            group['lr'] = group.get('lr', self.base_lr) * self.paramwise_cfg['layer_decay'] ** (depth + 1 - layer)


def find_layer(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 before the backbone's blocks, i + 1 in block i, depth + 1 elsewhere."""
    if block := re.match(r'backbone\.blocks\.(\d+)\.', name):
        return int(block[1]) + 1
    return 0 if name.startswith(('backbone.patch_embed.', 'backbone.pos_embeder.')) else depth + 1
