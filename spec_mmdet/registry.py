"""Registries of the scope ``spec_mmdet``, which MMEngine gives to configs inherited from ``spec_mmdet::``.

MMEngine imports this module by name. Each registry is an empty child of MMDetection's or MMEngine's, where all types
are found.
"""

import mmdet.registry
import mmengine.registry
from mmengine.registry import Registry

for _name, _root in vars(mmengine.registry).items():
    if isinstance(_root, Registry):
        _parent = getattr(mmdet.registry, _name, _root)
        globals()[_name] = Registry(_root.name, parent=_parent, scope='spec_mmdet', locations=['spec_mmdet.registered'])
