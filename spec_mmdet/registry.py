"""Registries of the scope ``spec_mmdet``, which MMEngine gives to what a config inherits from ``spec_mmdet::``.

MMEngine imports this module by its name. Each registry is a child of MMDetection's (or else of MMEngine's) and contains
nothing: every type is found in its parents.
"""

import mmdet.registry
import mmengine.registry
from mmengine.registry import Registry

for _name, _root in vars(mmengine.registry).items():
    if isinstance(_root, Registry):
        _parent = getattr(mmdet.registry, _name, _root)
        globals()[_name] = Registry(_root.name, parent=_parent, scope='spec_mmdet', locations=['spec_mmdet.registered'])
