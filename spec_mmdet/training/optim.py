"""The learning rates of a backbone's layers in fine-tuning."""

from __future__ import annotations

import re

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor, with layer-wise decay of the learning rate (as BEiT, arXiv 2106.08254, fine-tunes).

    All of ``paramwise_cfg`` holds as it does there. Besides, ``layer_decay`` is how much smaller the rate of each block
    of a SpecXCiT is than that of the block after it; stem and position encoding come before the first block, and the
    pyramid after the last one has the full rate, as has everything beside the backbone. (MMDetection's
    LearningRateDecayOptimizerConstructor knows ConvNeXt alone, and its own rules of weight decay.)
    """

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs) -> None:
        """Add the parameters of a module to the groups; see MMEngine."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:  # a part, by the recursion
            return
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        depth = len(module.backbone.blocks)
        for group in params:  # MMEngine makes one of each parameter
            layer = layer_of(names[id(group['params'][0])], depth)
            group['lr'] = group.get('lr', self.base_lr) * self.paramwise_cfg['layer_decay'] ** (depth + 1 - layer)


def layer_of(name: str, depth: int) -> int:
    """The layer of a detector's parameter: 0 before the backbone's blocks, i + 1 in block i, depth + 1 after them."""
    if block := re.match(r'backbone\.blocks\.(\d+)\.', name):
        return int(block[1]) + 1
    return 0 if name.startswith(('backbone.patch_embed.', 'backbone.pos_embeder.')) else depth + 1
