"""Data sets with one fault each: what prepare, train and test do with them, in one process."""

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line, run_tool
from mmengine.config import Config

from spec_mmdet.checkpoints.reading import load

FOLDER = Path(os.environ.get('SPEC_CASES', ROOT.parent / 'shared' / 'cases'))
CONFIG = ROOT / 'configs' / 'xcit_spec_shapes.py'
TINY = {
    'train_dataloader.batch_size': 4,
    'train_dataloader.dataset.indices': 8,  # two steps
    'train_cfg.max_epochs': 1,
    'param_scheduler.0.end': 1,
    'param_scheduler.1.end': 1,
    'model.backbone.arch': dict(dim=16, depth=4, num_heads=2),
    'model.backbone.out_indices': [0, 1, 2, 3],
    'model.neck.in_channels': [16] * 4,
    'default_hooks.logger.interval': 1,
    'visualizer.vis_backends': [],
}


def cases() -> dict:
    """Return the changes of a clean data set by name, each with the expected result, and whether a generator exists."""
    path = FOLDER / 'make_cases.py'
    if not path.is_file():
        return {}
    spec = importlib.util.spec_from_file_location('make_cases', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: (expect, change, module.write) for name, (expect, change) in module.CASES.items()}


CASES = cases()
OTHER_PIXELS = ('image_grey', 'rle_compressed')  # valid, with other pixels or mask targets (bitmaps, not polygons)
DRAWN = ('class_names_with_dollar', 'class_names_not_latin', 'file_names_not_latin', 'equal_names_in_two_folders')


def digest_of(checkpoint: Path) -> str:
    weights = load(checkpoint)['state_dict']
    return hashlib.sha256(b''.join(weights[key].numpy().tobytes() for key in sorted(weights))).hexdigest()


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> Iterator[Path]:
    """Train on the clean set."""
    if not CASES:
        pytest.skip(f'no cases at {FOLDER}; set SPEC_CASES')
    root = tmp_path_factory.mktemp('clean')
    CASES['clean'][2](root / 'data')
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(TINY)
    cfg.dump(root / 'tiny.py')
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_tool(monkeypatch, 'train', root / 'tiny.py', '--data', root / 'data', '--work-dir', root / 'work')
        yield root / 'work' / 'epoch_1.pth'


@pytest.mark.skipif(not CASES, reason=f'no cases at {FOLDER}; set SPEC_CASES')
@pytest.mark.parametrize('name', CASES)
def test_a_case(monkeypatch, clean, tmp_path, capfd, name):
    expect, change, write = CASES[name]
    monkeypatch.chdir(tmp_path)
    data, config = tmp_path / 'data', clean.parent.parent / 'tiny.py'
    train = ['train', config, '--data', data, '--work-dir', tmp_path / 'work']
    test = ['test', config, clean, '--data', data, '--work-dir', tmp_path / 'test']
    prepare = ['prepare', data]
    write(data, change)
    if expect == 'refused':
        for command in (prepare, train, test):
            line = error_line(monkeypatch, *command)
            assert re.search(r'instances_(train|val)\.json|00\d\.png', line), line
            assert 'Traceback' not in capfd.readouterr().err
        assert not (tmp_path / 'work').exists() and not (tmp_path / 'test').exists()
        return
    test[2] = tmp_path / 'work' / 'epoch_1.pth'
    if name in DRAWN:
        test += ['--show-dir', tmp_path / 'drawn', '--report', tmp_path / 'report']
        test += ['--cfg-options', 'model.test_cfg.rcnn.score_thr=0', 'default_hooks.visualization.score_thr=0']
    else:
        train += ['--cfg-options', 'default_hooks.results=None']  # plots and pictures
    for command in (prepare, train, test)[: 3 if name in DRAWN else 2]:  # the training evaluates
        run_tool(monkeypatch, *command)
        printed = capfd.readouterr()
        assert 'Traceback' not in printed.out + printed.err and '\nerrors' not in printed.out
        warnings = printed.out.partition('\nwarnings:\n')[2].partition('\n\n')[0]
        assert bool(re.match(r' *[1-9]\d* ', warnings)) == (expect == 'warned'), printed.out
    if expect == 'ready' and name not in OTHER_PIXELS:
        assert digest_of(test[2]) == digest_of(clean)
    if name in DRAWN:
        names = {path.relative_to(data / 'val') for path in (data / 'val').rglob('*.png')}
        assert {path.relative_to(tmp_path / 'drawn') for path in (tmp_path / 'drawn').rglob('*.png')} == names
        assert (tmp_path / 'report' / 'index.html').is_file()
    assert torch.isfinite(load(test[2])['state_dict']['neck.fpn_convs.0.conv.weight']).all()
