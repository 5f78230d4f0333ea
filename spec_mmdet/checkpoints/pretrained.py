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
    """Load a checkpoint in any layout that :func:`recognise` knows into a backbone, all of it or nothing.

    Args:
        backbone: its fpn1 to fpn4 stay as they are where the checkpoint has none. A classifier's class attention, norm
            and head stay as they are in any case.
        path: a file, or an address.

    Raises:
        InputError: if the checkpoint cannot be read, is none of an XCiT, or is of another architecture or conditioning
            than the backbone.
    """
    name = f'checkpoint {path}'
    found = recognise(load(path), name)
    with prefix_errors(name):
        require_same_conditioning(found.backbone, backbone.state_dict())
    own = backbone.state_dict()
    # A classifier has no pyramid, and what is a classifier's is not taken from one either.
    taken = {key: value for key, value in found.backbone.items() if key in own or not key.startswith('fpn')}
    kept = {key: value for key, value in own.items() if key in found.missing or key.startswith(CLASSIFIER)}
    faults = describe_mismatches(backbone, {**kept, **taken})
    if faults:
        raise InputError(f'{name} is of another XCiT than the configured one ({found}): {faults}')
    backbone.load_state_dict({**kept, **taken})
    left = f'; not in it, and initialised: {", ".join(kept)}' if kept else ''
    MMLogger.get_current_instance().info(f'{name}: {found}; loaded {len(taken)} tensors{left}')


@WEIGHT_INITIALIZERS.register_module()
class XCiTPretrained(PretrainedInit):
    """An initialiser that loads all of a SpecXCiT's weights, or fails; MMEngine's "Pretrained" skips what mismatches.

    A SpecXCiT uses it for ``init_cfg=dict(type='Pretrained', ...)``, too.
    """

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into a SpecXCiT; see :func:`load_backbone`."""
        load_backbone(module, self.checkpoint)
