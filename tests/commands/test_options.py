"""Every option has an effect, or is rejected in one line that says what to write."""

import json
import logging
import traceback

import numpy as np
import pytest
from conftest import CONFIG, error_line, options, run_tool
from mmcv.transforms import Compose
from mmengine.config import Config

from spec_mmdet.checkpoints.reading import load
from spec_mmdet.commands import test as testing
from spec_mmdet.commands.options import adjust_dependent_settings, explain_config_error, merge
from spec_mmdet.errors import InputError

FEW = ['train_dataloader.dataset.indices=8']  # two steps of four images


@pytest.mark.parametrize(
    ('key', 'says'),
    [
        ('max_epochs', '--epochs or train_cfg.max_epochs'),
        ('train_pipeline', 'Set train_dataloader.dataset.pipeline'),
        ('data_root', 'Set --data'),
        ('seed', 'randomness.seed'),
        ('train_cfg.max_epoch', 'did you mean train_cfg.max_epochs?'),
        ('model.backbon.arch', 'did you mean model.backbone?'),
        ('model.backbone.with_pc', 'did you mean model.backbone.with_cp?'),
        ('model.roi_head.bbox_head.num_class', 'did you mean model.roi_head.bbox_head.num_classes?'),
        ('model.test_cfg.rcnn.max_per_image', 'did you mean model.test_cfg.rcnn.max_per_img?'),
        ('train_dataloader.batchsize', 'did you mean train_dataloader.batch_size?'),
        ('train_dataloader.dataset.indexes', 'did you mean train_dataloader.dataset.indices?'),
        ('train_dataloader.dataset.metainfo.clases', 'metainfo.classes?'),
        ('randomness.sed', 'did you mean randomness.seed?'),
        ('optim_wrapper.optimizer.learning_rate', 'nothing reads learning_rate in optim_wrapper.optimizer'),
        ('param_scheduler.2.end', 'param_scheduler is a list of 2'),
        ('model.backbone.patch_size.high', 'model.backbone.patch_size is 8 in the config, not a dict'),
        ('entirely_unknown', 'nothing reads entirely_unknown in the config'),
    ],
)
def test_an_unused_key_is_rejected(key, says):
    cfg = Config.fromfile(CONFIG)
    before = cfg.to_dict()
    with pytest.raises(InputError) as refused:
        merge(cfg, {key: 1})
    assert says in str(refused.value) and f'--cfg-options {key}: ' in str(refused.value)
    assert cfg.to_dict() == before


def test_arguments_of_a_replaced_type_are_removed(capsys):
    cfg = Config.fromfile(CONFIG)
    lr = cfg.optim_wrapper.optimizer.lr
    merge(cfg, {'optim_wrapper.optimizer.type': 'SGD', 'optim_wrapper.optimizer.momentum': 0.9})
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=lr, weight_decay=0.05, fused=True, momentum=0.9)
    assert 'optim_wrapper.optimizer.betas: removed' in capsys.readouterr().err


@pytest.mark.parametrize(
    'settings',
    [
        {'train_cfg.max_epochs': 1},
        {'train_cfg.val_interval': 2},
        {'model.backbone.with_cp': True},
        {'model.backbone.init_cfg.type': 'Pretrained', 'model.backbone.init_cfg.checkpoint': 'file.pth'},
        {'model.test_cfg.rcnn.nms.type': 'soft_nms', 'model.test_cfg.rcnn.nms.min_score': 0.01},
        {'optim_wrapper.accumulative_counts': 4},
        {'optim_wrapper.optimizer.type': 'SGD', 'optim_wrapper.optimizer.momentum': 0.9},
        {'default_hooks.ema.type': 'EMAHook', 'default_hooks.ema.momentum': 0.5},
        {'train_dataloader.drop_last': True},
        {'train_dataloader.dataset.indices': 8},
        {'train_dataloader.dataset.metainfo.classes': ('circle',)},
        {'test_evaluator.format_only': True, 'test_evaluator.outfile_prefix': 'out'},
        {'default_hooks.conditioning.interval': 5},
        {'load_from': 'file.pth'},
        {'env_cfg.dist_cfg.backend': 'gloo'},
        {'model_wrapper_cfg.type': 'MMDistributedDataParallel', 'model_wrapper_cfg.device_ids': None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_used_key_is_accepted(settings):
    cfg = Config.fromfile(CONFIG)
    merge(cfg, settings)
    for key, value in settings.items():
        node = cfg
        for part in key.split('.'):
            node = node[int(part)] if isinstance(node, list) else node[part]
        assert node == value


def test_cfg_options_may_come_before_the_config(monkeypatch, shapes, tmp_path):
    for argv in (
        ['--cfg-options', 'a.b=1', 'c=[2,3]', 'config.py', 'checkpoint.pth', '--tta'],
        ['config.py', '--cfg-options', 'a.b=1', '--tta', '--cfg-options', 'c=[2,3]', 'checkpoint.pth'],
    ):
        args = testing.parse(argv)
        assert (args.config, args.checkpoint, args.tta) == ('config.py', 'checkpoint.pth', True)
        assert args.cfg_options == {'a.b': 1, 'c': [2, 3]}
    for wrong in ('c=[2,(3]', 'word'):
        with pytest.raises(SystemExit) as ended:
            testing.parse(['config.py', 'checkpoint.pth', '--cfg-options', wrong])
        assert ended.value.code == 2


def test_dependent_settings_are_adjusted(capsys):
    cfg = Config.fromfile(CONFIG)
    merge(cfg, {'train_dataloader.persistent_workers': True, 'model.backbone.arch.dim': 64})
    adjust_dependent_settings(cfg)
    assert not cfg.train_dataloader.get('persistent_workers') and cfg.model.neck.in_channels == [64] * 4
    told = capsys.readouterr().err
    assert 'num_workers is 0' in told and 'in_channels=[64, 64, 64, 64]' in told


@pytest.mark.parametrize(
    ('settings', 'says'),
    [
        (['model.backbone.arch.depth=3'], 'depth must be at least 4'),
        (['model.backbone.arch.num_heads=5'], 'dim must be a multiple of 8 and of num_heads'),
        (['default_hooks.more.type=Zqxvvw'], 'Zqxvvw is not in the hook registry'),
        (['model.backbone.type=SpecXCit'], 'SpecXCit is not in the model registry; did you mean SpecXCiT?'),
        (['train_dataloader.dataset.type=CocoDatasets'], 'did you mean CocoDataset?'),
        (['optim_wrapper.optimizer.type=Lion'], 'pip install lion-pytorch'),
        (["visualizer.vis_backends=[{'type':'ClearMLVisBackend'}]"], None),
    ],
)
def test_a_config_that_cannot_be_built_is_one_line(monkeypatch, shapes, tmp_path, settings, says):
    if says is None:  # a tracker that is not installed
        tracker = tmp_path / 'tracker.py'
        tracker.write_text(f"_base_ = '{CONFIG}'\nvisualizer = dict(vis_backends=[dict(type='ClearMLVisBackend')])\n")
        args = [tracker, '--work-dir', tmp_path / 'work', *options(shapes)]
        assert 'pip install clearml' in error_line(monkeypatch, 'train', *args)
        return
    args = [CONFIG, '--work-dir', tmp_path / 'work', *options(shapes), *settings]
    assert says in error_line(monkeypatch, 'train', *args)


@pytest.mark.parametrize(
    ('command', 'says'),
    [
        ('train CONFIG --epochs 0', '0: give an integer from 1 on'),
        ('train CONFIG --epochs 1.5', '1.5: give an integer from 1 on'),
        ('train CONFIG --lr nan', 'nan: give a number above 0'),
        ('train CONFIG --cfg-options seed', 'seed: write KEY=VALUE'),
        ('train CONFIG --work-dir x --cfg-options randomness.seed=-5', 'randomness.seed in the config is -5'),
        ('train CONFIG --work-dir x --cfg-options train_cfg.val_interval=0', 'val_interval in the config is 0'),
        ('train CONFIG --work-dir x --cfg-options optim_wrapper=None', 'optim_wrapper of the config is None'),
        ('test CONFIG a.pth --cfg-options test_evaluator=None', 'test_evaluator of the config is None'),
        ('test CONFIG a.pth --show-dir /proc/x', '/proc/x: could not be written'),
        ('convert a.pth b.pth --condition identity --lam -1', '-1: give a number above 0'),
        ('benchmark --sizes 0x0', '--sizes 0x0: write HEIGHTxWIDTH'),
        ('benchmark --device banana', '--device banana: not available'),
        ('gpu-check --device banana', '--device banana: not available'),
        ('prepare . --out x --val x', 'x: give a number of images'),
        ('prepare . --val 1 --out /proc/x', '/proc/x: could not be written'),
    ],
)
def test_an_invalid_value_is_one_line(monkeypatch, tmp_path, capsys, command, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run_tool(monkeypatch, *command.replace('CONFIG', str(CONFIG)).split())
    lines = f'{capsys.readouterr().err}\n{stopped.value.code}'.splitlines()
    assert [line for line in lines if 'error: ' in line and says in line]


def test_a_transform_that_fails_is_named():
    try:
        Compose([dict(type='Resize', scale=(10**7, 10**7))])(dict(img=np.zeros((4, 4, 3), np.uint8), img_shape=(4, 4)))
    except Exception as error:
        assert 'transform (Resize) failed' in explain_config_error(error)
        worker = RuntimeError(f'Caught error in DataLoader worker process 0.\n{traceback.format_exc()}')
        assert 'transform (processing) failed' in explain_config_error(worker)


def test_a_fault_of_the_program_stays_a_traceback(monkeypatch, shapes, tmp_path):
    def faulty(self, dim, *args):
        return {}['absent']

    monkeypatch.setattr('spec_mmdet.models.xcit.Block.__init__', faulty)
    monkeypatch.setitem(globals(), '__name__', 'spec_mmdet.faulty')
    with pytest.raises(KeyError, match='absent'):
        run_tool(monkeypatch, 'train', CONFIG, '--work-dir', tmp_path, *options(shapes))


def test_options_of_the_schedule(monkeypatch, shapes, tmp_path, caplog):
    """Train two steps of a minimal model for each option and check the written files."""
    few = ['--cfg-options', 'model.backbone.arch.depth=4', *FEW]
    sizes = ['--epochs', 2, '--batch-size', 8, '--image-size', 64, '--lr', 3e-4]
    with caplog.at_level(logging.WARNING):
        run_tool(monkeypatch, 'train', CONFIG, '--data', shapes, '--work-dir', tmp_path, *sizes, *few)
    cfg = Config.fromfile(tmp_path / CONFIG.name)
    assert cfg.train_dataloader.batch_size == 8 and cfg.optim_wrapper.optimizer.lr == 3e-4
    assert cfg.train_dataloader.dataset.pipeline[2].scale == cfg.test_dataloader.dataset.pipeline[1].scale == (64, 64)
    assert load(tmp_path / 'epoch_2.pth')['meta']['iter'] == 2
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    assert any('coco/segm_mAP' in json.loads(line) for line in scalars.read_text().splitlines())
    (log,) = (path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'random weights' in log and '8 images' in log
    says = error_line(monkeypatch, 'train', CONFIG, '--data', shapes, '--lr', 1, '--auto-scale-lr')
    assert 'cannot be combined' in says
    finetune = ['--work-dir', tmp_path / 'other', '--preset', 'finetune', *few]
    says = error_line(monkeypatch, 'train', CONFIG, '--data', shapes, *finetune)
    assert 'frozen_stages' in says and 'model.backbone.init_cfg.checkpoint=FILE' in says


def test_a_dict_replaces_none_and_deleted_values():
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.conditioning = None
    cfg.model.backbone.arch = 'nano_12'
    arch = dict(dim=16, depth=4, num_heads=2)
    options = {f'model.backbone.arch.{key}': value for key, value in (dict(_delete_=True) | arch).items()}
    merge(cfg, {'model.backbone.conditioning.type': 'svd', **options})
    assert cfg.model.backbone.conditioning == dict(type='svd') and cfg.model.backbone.arch == arch
