"""Importing the package adds names, and changes no object of other packages."""

import json
import os
import subprocess
import sys

import pytest
from conftest import CONFIG, ROOT

# Prints the current value of every object that an import could replace, by name.
SNAPSHOT = """
import json, logging, types, warnings
import torch, PIL.Image, mmengine.registry, mmengine.fileio
import mmcv.transforms, mmdet.registry, mmdet.apis, mmdet.datasets, mmdet.engine, mmdet.evaluation, mmdet.models
import mmdet.visualization, pycocotools.cocoeval
from mmengine.config import Config, utils
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader, Runner
from mmdet.evaluation.metrics import coco_metric
from torch import _weights_only_unpickler
try:
    from timm.data import auto_augment
except ImportError:
    auto_augment = None

kept = []  # so that no id is used twice


def name(thing):
    kept.append(thing)
    return f'{getattr(thing, "__module__", "")} {getattr(thing, "__qualname__", type(thing).__name__)} {id(thing)}'


def registries(registry):
    yield registry
    for child in registry.children.values():
        yield from registries(child)


def snapshot():
    found = {}
    for root in vars(mmengine.registry).values():
        for registry in registries(root) if isinstance(root, Registry) else ():
            registry.import_from_location()
            for key, value in registry.module_dict.items():
                found[f'registry {registry.scope} {registry.name}: {key}'] = name(value)
    for owner in (Config, CheckpointLoader, Runner, Registry, torch.hub, torch.serialization, _weights_only_unpickler,
                  coco_metric, pycocotools.cocoeval.COCOeval, PIL.Image, logging, warnings, mmengine.fileio):
        for key, value in vars(owner).items():
            skipped = key.startswith('__') or key in ('_schemes', 'filters') or isinstance(value, types.ModuleType)
            if not skipped:
                simple = isinstance(value, (int, str, float, type(None)))
                found[f'member {owner.__name__}: {key}'] = repr(value) if simple else name(value)
    found['torch.load'] = name(torch.load)
    found |= {f'scheme {key}': name(value) for key, value in CheckpointLoader._schemes.items()}
    found |= {f'backend {key}': name(value) for key, value in [*backends.items(), *prefix_to_backends.items()]}
    found |= {f'package {key}': value for key, value in utils.MODULE2PACKAGE.items()}
    found['filters'] = repr([entry for entry in warnings.filters if entry[2] is not DeprecationWarning])
    found['safe globals'] = repr(sorted(map(repr, torch.serialization.get_safe_globals())))
    found['logging'] = repr([logging.root.level, logging.root.handlers, logging.root.manager.disable])
    for table in ('NAME_TO_OP', 'LEVEL_TO_ARG') if auto_augment else ():
        found |= {f'timm {table}: {key}': name(value) for key, value in getattr(auto_augment, table).items()}
    return found


before = snapshot()
import spec_mmdet
from spec_mmdet import registered
import spec_mmdet.registry
if auto_augment:
    import spec_mmdet.data.classification
after = snapshot()
print(json.dumps([before, after]))
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, '-W', 'ignore', *(arguments or ('-c', code))]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}  # without tests/bare, which blocks libraries
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_import_only_adds_names():
    before, after = json.loads(run(SNAPSHOT).splitlines()[-1])
    assert len(before) > 1000
    for kind in ('registry mmdet', 'registry mmengine', 'member Config', 'scheme', 'backend', 'package', 'filters'):
        assert any(name.startswith(kind) for name in before), kind
    changed = {name for name, value in before.items() if after.get(name) != value}
    assert {name for name in changed if not name.startswith('scheme ')} == set()
    assert {name for name in changed if name.startswith('scheme ')} == {n for n in before if n.startswith('scheme ')}
    added = after.keys() - before.keys()
    assert {'registry mmdet hook: AtomicCheckpointHook', 'backend atomic', 'package spec_mmdet'} <= added
    ours = {name for name in added if after[name].startswith('spec_mmdet')}
    assert added == ours


SWIN = """
import numpy as np, sys, torch, warnings
warnings.simplefilter('ignore')
import spec_mmdet
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import CheckpointLoader

register_all_modules()
cfg = Config.fromfile(sys.argv[1])
cfg.model.backbone.init_cfg = None
torch.save(dict(model=MODELS.build(cfg.model.backbone).state_dict()), 'swin.pth')
cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='swin.pth')
model = MODELS.build(cfg.model)
model.init_weights()
weights = CheckpointLoader.load_checkpoint('swin.pth')['model']
# The names of others are converted from those of Swin's authors.
assert all(torch.equal(v, weights[k]) for k, v in model.backbone.state_dict().items() if k.startswith('stages.'))
optim = build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=cfg.optim_wrapper.optimizer))
shapes = [[3, 64, 96]]
batch = demo_mm_inputs(1, shapes, num_classes=80, with_mask=True, use_box_type=True)
losses = model.train_step(batch, optim)
changed = sum(not torch.equal(v, weights[k]) for k, v in model.backbone.state_dict().items() if k.startswith('stages.'))
assert losses['loss'].isfinite() and changed > 50
print('trained')
"""


def test_mmdetections_swin_trains_from_weights_under_model(tmp_path):
    (tmp_path / 'config.py').write_text("_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'")
    command = [sys.executable, '-c', SWIN, str(tmp_path / 'config.py')]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1].startswith('trained'), ran.stderr


def test_the_package_gives_its_names_under_every_entry_point(tmp_path):
    code = 'from spec_mmdet import SpecXCiT; print(SpecXCiT.__module__)'
    assert run(code).splitlines()[-1] == 'spec_mmdet.models.xcit'
    (tmp_path / 'mine.py').write_text(f'{code}\nfrom spec_mmdet import *\n')
    config = tmp_path / 'config.py'
    config.write_text(f"_base_ = {str(CONFIG)!r}\ncustom_imports = dict(imports=['spec_mmdet', 'mine'])\n")
    tool, console = [str(ROOT / 'tools' / 'train.py')], ['-m', 'spec_mmdet', 'train']
    script = tmp_path / 'spec-mmdet'
    script.write_text('import sys\nfrom spec_mmdet.commands import main\nsys.exit(main())\n')
    for entry in (tool, console, [str(script), 'train']):
        # It ends when the config, which imports the names, has been read.
        command = [sys.executable, *entry, str(config), '--work-dir', str(tmp_path), '--resume', 'absent.pth']
        environment = {**os.environ, 'PYTHONPATH': f'{os.environ["PYTHONPATH"]}{os.pathsep}{tmp_path}'}
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert 'spec_mmdet.models.xcit\n' in ran.stdout and 'absent.pth' in ran.stderr, ran.stdout + ran.stderr


def test_a_missing_name_is_an_attribute_error():
    import spec_mmdet

    with pytest.raises(AttributeError, match='no attribute'):
        getattr(spec_mmdet, 'Absent')  # noqa: B009
    with pytest.raises(ImportError):
        from spec_mmdet import absent  # noqa: F401
