"""MMDetection's types in a config are replaced by ours, and guards are added, for every way to name them."""

import pytest
from conftest import CONFIG, ROOT, options, run_tool
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.runner import Runner

from spec_mmdet.configs import read_config
from spec_mmdet.errors import InputError
from spec_mmdet.substitution import GUARDS, TABLE, add_guards, protect, substitute_types
from spec_mmdet.training.runners import WholeConfigRunner

SWIN = "_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'\n"
NEW_STYLE = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import PackDetInputs
from mmdet.evaluation import CocoMetric
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import SGD

default_scope = None
pipeline = [dict(type=LoadImageFromFile), dict(type=PackDetInputs)]
train_dataloader = dict(dataset=dict(type=CocoDataset, pipeline=pipeline))
val_evaluator = dict(type=CocoMetric)
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.1))
default_hooks = dict(checkpoint=dict(type=CheckpointHook), logger=dict(type=LoggerHook))
"""


def config(tmp_path, text: str) -> Config:
    (tmp_path / 'config.py').write_text(text)
    return read_config(tmp_path / 'config.py')


def test_a_config_of_mmdetection(tmp_path, capsys):
    cfg = config(tmp_path, SWIN)
    protect(cfg)
    (line,) = capsys.readouterr().out.splitlines()
    for _, theirs, ours in TABLE:
        assert (f'{theirs} -> {ours}' in line) == ('IterBased' not in theirs and 'Panoptic' not in theirs)
    assert all(name in line for name in GUARDS)
    assert cfg.train_dataloader.dataset.type == cfg.val_dataloader.dataset.type == 'CheckedCocoDataset'
    assert cfg.val_evaluator.type == 'FastCocoMetric' and cfg.train_cfg.type == 'ExactEpochTrainLoop'
    # MMDetection's DetInferencer looks for this name.
    loaders = [cfg[f'{loop}_dataloader'].dataset.pipeline[0].type for loop in ('train', 'val', 'test')]
    assert loaders == ['CheckedLoadImageFromFile', 'CheckedLoadImageFromFile', 'LoadImageFromFile']
    assert "type='FiniteGuard'" in cfg.pretty_text and "type='AtomicCheckpointHook'" in cfg.pretty_text
    protect(cfg, testing=True)
    assert cfg.test_dataloader.dataset.pipeline[0].type == 'CheckedLoadImageFromFile'
    capsys.readouterr()
    protect(cfg, testing=True)
    assert capsys.readouterr().out == ''


def test_an_mmdetection_config_with_our_backbone_has_our_runtime(tmp_path, capsys):
    """Records and guards are the same as those of configs/_base_/runtime.py, which cannot be a second base."""
    base = "'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'"
    backbone = "model = dict(backbone=dict(_delete_=True, type='SpecXCiT'))"
    cfg = config(tmp_path, f'_base_ = {base}\n{backbone}')
    protect(cfg)
    ours = read_config(ROOT / 'configs' / '_base_' / 'runtime.py')
    assert {*ours.default_hooks} <= {*cfg.default_hooks} and cfg.custom_imports == ours.custom_imports
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    with pytest.raises(InputError, match='the commands add its hooks'):
        config(tmp_path, f"_base_ = [{base}, 'spec_mmdet::_base_/runtime.py']\n{backbone}")


def test_keep_types(tmp_path, capsys):
    cfg = config(tmp_path, SWIN)
    before = cfg.to_dict()
    protect(cfg, keep_types=True, running=False)
    assert capsys.readouterr().out == '' and cfg.to_dict() == before
    protect(cfg, keep_types=True)  # only types, no guards
    assert cfg.custom_imports.imports == ['spec_mmdet']
    assert (
        cfg.default_hooks.finite_guard.type == 'FiniteGuard' and cfg.default_hooks.checkpoint.type == 'CheckpointHook'
    )


def test_our_own_configs_need_nothing(capsys):
    cfg = read_config(CONFIG)
    before = cfg.to_dict()
    protect(cfg)
    assert capsys.readouterr().out == '' and cfg.to_dict() == before


def test_a_new_style_config_and_its_dump(tmp_path):
    cfg = config(tmp_path, NEW_STYLE)
    assert cfg.train_dataloader.dataset.type is CocoDataset
    dumped = config(tmp_path, cfg.pretty_text)  # as strings, like mmdet.datasets.coco.CocoDataset
    for new in (cfg, dumped):
        assert len(substitute_types(new)) == 5
        assert new.train_dataloader.dataset.type == 'CheckedCocoDataset' and new.default_scope == 'mmdet'
        assert [step.type for step in new.train_dataloader.dataset.pipeline] == [
            'CheckedLoadImageFromFile',
            'PackDetInputs',
        ]
        assert new.optim_wrapper.optimizer.type == 'SGD' and new.default_hooks.logger.type == 'LoggerHook'


def test_a_subclass_and_other_spellings():
    class Mine(CocoDataset):
        """A user's own subclass."""

    loops = dict(train_cfg=dict(by_epoch=False, max_iters=1), default_scope='mmdet')
    datasets = [dict(type=Mine), dict(type='mmdet.CocoDataset'), dict(type=CocoDataset)]
    cfg = Config(dict(train_dataloader=dict(dataset=dict(datasets=datasets)), **loops))
    substitute_types(cfg)
    kinds = [dataset.type for dataset in cfg.train_dataloader.dataset.datasets]
    assert kinds == [Mine, 'CheckedCocoDataset', 'CheckedCocoDataset']
    assert cfg.train_cfg == dict(type='ExactIterTrainLoop', max_iters=1)
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='mmdet.CocoDataset')), default_scope='mmseg'))
    substitute_types(cfg)
    assert DATASETS.get(cfg.train_dataloader.dataset.type).__name__ == 'CheckedCocoDataset'


def test_guards_are_turned_off_by_name_alone(capsys):
    cfg = Config(dict(default_scope='mmdet', custom_hooks=[dict(type='LoaderGuard')], default_hooks=dict(timer=None)))
    cfg.default_hooks.finite_guard = None
    protect(cfg)
    line = capsys.readouterr().out
    assert 'finite_guard (turned off)' in line and 'loader_guard' not in line
    assert cfg.default_hooks.checkpoint.type == 'AtomicCheckpointHook' and cfg.default_hooks.finite_guard is None
    assert add_guards(cfg) == ['finite_guard (turned off)']


def test_a_hook_of_any_name_may_be_none(monkeypatch):
    seen = {}
    monkeypatch.setattr(Runner, 'register_default_hooks', lambda self, hooks: seen.update(hooks))
    runner = WholeConfigRunner.__new__(WholeConfigRunner)
    runner.register_default_hooks(dict(finite_guard=None, timer=None, results=dict(type='ResultsHook')))
    assert seen == dict(timer=None, results=dict(type='ResultsHook'))


@pytest.mark.parametrize(
    'hooks', ['custom_hooks = [dict(type="NumClassCheckHook")]', 'default_hooks = dict(_delete_=True)']
)
def test_hooks_of_ones_own_do_not_remove_the_guards(monkeypatch, shapes, tmp_path, hooks):
    own = tmp_path / 'own.py'
    own.write_text(f'_base_ = {str(CONFIG)!r}\n{hooks}\n')
    few = ['train_dataloader.dataset.indices=8', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    run_tool(monkeypatch, 'train', own, '--work-dir', tmp_path / 'work', *options(shapes), *few)
    text = (tmp_path / 'work' / 'own.py').read_text()
    assert all(f"type='{kind}'" in text for kind in [*GUARDS.values(), 'AtomicCheckpointHook'])
    assert (tmp_path / 'work' / 'last_checkpoint').read_text() == 'epoch_1.pth'


def test_a_detector_of_mmdetection_in_two_lines(monkeypatch, shapes, tmp_path, capsys):
    """The base's R50 is replaced; neck, classes and records follow."""
    own = tmp_path / 'own.py'
    backbone = dict(_delete_=True, type='SpecXCiT', arch=dict(dim=32, depth=4, num_heads=4))
    own.write_text(f"_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\nmodel = dict(backbone={backbone!r})\n")
    few = ['train_dataloader.dataset.indices=4', 'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0']
    work = tmp_path / 'work'
    run_tool(monkeypatch, 'train', own, '--data', shapes, '--work-dir', work, '--image-size', 64, '--epochs', 1,
             '--no-check', '--cfg-options', *few)  # fmt: skip
    told = capsys.readouterr()
    assert 'model.neck.in_channels=[32, 32, 32]' in told.err and 'checkpoint.save_best=coco/bbox_mAP' in told.out
    written = {path.name for path in work.iterdir()}
    assert {'epoch_1.pth', 'run.json', 'results.csv', 'results.png'} <= written


def test_custom_hooks_that_are_no_list_of_hooks_are_rejected():
    for hooks in ('[{type:EMAHook}]', [None], dict(type='EMAHook')):
        with pytest.raises(InputError, match='custom_hooks'):
            add_guards(Config(dict(custom_hooks=hooks)))
