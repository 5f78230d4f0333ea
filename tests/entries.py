"""List every command that reads a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CONFIG, options, run_tool

from spec_mmdet import InputError

# These read only weights: they ignore other forged parts and would continue.
OF_WEIGHTS = ('load_from', 'init_cfg', 'export', 'convert', 'analyze')


def entries(monkeypatch: pytest.MonkeyPatch, shapes: Path, work: Path) -> dict[str, Callable[[Path], None]]:
    """Return the entry points, as functions of a checkpoint's path.

    Args:
        shapes: a data set of shapes.
        work: a folder to write to.
    """

    unchecked = [CONFIG, '--no-check', '--work-dir']
    few = ['train_dataloader.dataset.indices=4', 'default_hooks.checkpoint.interval=9', 'val_cfg=None']
    few += ['val_dataloader=None', 'val_evaluator=None']

    def train(*extra):
        run_tool(monkeypatch, 'train', *unchecked, work / 'train', *options(shapes), *few, *extra)

    def resume(path):
        # The training in the file is finished, so that only reading is tested.
        without = [setting for setting in few if 'indices' not in setting]
        run_tool(monkeypatch, 'train', *unchecked, work / 'resume', '--resume', path, *options(shapes), *without)

    def convert(path):
        run_tool(monkeypatch, 'convert', path, work / f'{Path(path).stem}.safetensors')

    def analyze(path):
        run_tool(monkeypatch, 'analyze', CONFIG, path, '--out', work / 'analyze')

    def predict(path):
        run_tool(monkeypatch, 'predict', CONFIG, path, image, '--out', work / path.stem, '--device', 'cpu')

    init_cfg = 'model.backbone.init_cfg'
    image = shapes / 'val' / '000001.png'
    test = ['--no-check', '--work-dir', work / 'test', *options(shapes), 'test_dataloader.dataset.indices=2']
    return {
        'train --resume': resume,
        'load_from': lambda path: train(f'load_from={path}'),
        'init_cfg': lambda path: train(f'{init_cfg}.type=Pretrained', f'{init_cfg}.checkpoint={path}'),
        'test': lambda path: run_tool(monkeypatch, 'test', CONFIG, path, *test),
        'predict': predict,
        'export': lambda path: run_tool(monkeypatch, 'export', CONFIG, path, work / f'{path.stem}.onnx'),
        'convert': convert,
        'analyze': analyze,
    }


def try_entry(enter: Callable[[Path], None], path: Path) -> str:
    """Return '' if a checkpoint is accepted, else the error's one line; other exceptions are raised."""
    try:
        enter(path)
    except InputError as error:
        says = str(error)
    except SystemExit as ended:
        if not ended.code:
            return ''
        says = str(ended.code)
        assert says.startswith('error: '), says
    else:
        return ''
    assert '\n' not in says and len(says) < 2000, says
    return says
