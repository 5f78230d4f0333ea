"""Load a SpecXCiT's weights from a checkpoint: ``init_cfg=dict(type='XCiTPretrained', checkpoint=FILE)``."""

from __future__ import annotations

from pathlib import Path

from mmengine.logging import MMLogger
from mmengine.model import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..conditioning import require_same_conditioning
from ..errors import InputError, prefix_errors
from ..models.xcit import SpecXCiT
from .layouts import CLASSIFIER, recognise
from .reading import describe_mismatches, load


def load_backbone(backbone: SpecXCiT, path: str | Path) -> None:
    """Load a checkpoint in any layout of :func:`recognise` into a backbone; on an error, nothing is loaded.

    fpn1 to fpn4 are unchanged if the checkpoint lacks them. A classifier's class attention, norm and head are never
    loaded.

    Raises:
        InputError: if the checkpoint cannot be read, is not an XCiT, or differs from the backbone in architecture or
            conditioning.
    """
    name = f'checkpoint {path}'
    found = recognise(load(path), name)
    with prefix_errors(name):
        require_same_conditioning(found.backbone, backbone.state_dict())
    own = backbone.state_dict()
    taken = {key: value for key, value in found.backbone.items() if key in own or not key.startswith('fpn')}
    kept = {key: value for key, value in own.items() if key in found.missing or key.startswith(CLASSIFIER)}
    faults = describe_mismatches(backbone, {**kept, **taken})
    if faults:
        raise InputError(
            f'{name}: does not fit the configured XCiT: {faults}. The file contains {found}. Configure this'
        )
    backbone.load_state_dict({**kept, **taken})
    left = f'; initialised, because the checkpoint lacks them: {", ".join(kept)}' if kept else ''
    MMLogger.get_current_instance().info(f'{name}: {found}; loaded {len(taken)} tensors{left}')


@WEIGHT_INITIALIZERS.register_module()
class XCiTPretrained(PretrainedInit):
    """Initialiser that loads all weights of a SpecXCiT or fails; MMEngine's "Pretrained" skips mismatches.

    SpecXCiT also uses it for ``init_cfg=dict(type='Pretrained', ...)``.
    """

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into a SpecXCiT; see :func:`load_backbone`."""
        load_backbone(module, self.checkpoint)
