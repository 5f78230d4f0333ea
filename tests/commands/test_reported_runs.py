"""Reports by users of such tools, rebuilt at a small size outside this repository: trainings and what follows them.

The cases of ``prepare`` are in tests/data/test_reports.py, and predict_onnx_pad is in tests/commands/test_export.py,
which exports a detector.
"""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, copy_reports, run_tool

# The training that starts several cases, with or without the option after it. It runs once.
SHARED = re.compile(
    r'spec-mmdet train ../fast.py --data data --batch-size 5 --epochs 2 --work-dir (\w+)'
    r'( --cfg-options default_hooks.logger.interval=1)?'
)
# The number of commands to run, and parts of what they print; an error starts with "error: ".
CASES = {
    'averaged_checkpoint': (4, ['from mean.pth', 'box AP']),
    'bf16_cpu': (2, ['no GPU: .*float32', 'last checkpoint']),
    'cached_mosaic': (2, ['will not be bit-identical', 'last checkpoint']),
    'checkpoint_out_dir': (5, ['resumed from ckpts/w/epoch_2.pth', 'last checkpoint: ckpts/w/epoch_3.pth']),
    'class_weight': (2, ['error: .*class_weight .*2 numbers.* 3']),
    'compare_other_data': (5, ['Evaluate both on the same annotation file']),
    'condition_lookahead': (1, ['C 1.000 times', 'InputError: keep_fixed: Lookahead']),
    'dense': (2, ['9  images with more than 100 objects']),
    'drop_last': (2, ['error: .*10 images are fewer than a batch of 64']),
    'ema_weights_alone': (5, ['from w/published/model.pth', 'from w/published/model.safetensors', 'box AP']),
    'huge_image': (2, ['1 pictures; wrote out2']),
    'mask2former_heads': (2, ['last checkpoint']),
    'onnx_thin_image': (4, ['skipped 1 .*exported', 'OnnxDetector of det.onnx', 'box AP']),
    'other_optimizers': (3, ['betas: removed', 'schedule .*SGD', 'error: .* no optimiser Lion']),
    'own_hooks': (3, ['last checkpoint: other', 'error: .*other/epoch_1.pth does not fit .* 119 with a wrong shape']),
    'pretrain_checkpoints_folder': (2, ['hidden .*ipynb_checkpoints', '3 classes: a, b, c']),
    'pretrained_gone': (8, ['from backbone.pth', 'resumed from w/epoch_1.pth', 'box AP', 'wrote w/published']),
    'publish_interrupted': (4, ['SIGTERM: saving', 'within epoch 2']),
    'resume_lr': (6, ['1e-06']),
    'save_best_name': (2, ['error: save_best .*bbox_mAP.* coco/bbox_mAP']),
}


@pytest.fixture(scope='module')
def reports(tmp_path_factory) -> Path:
    """Return a writable copy of the cases; 000_good has the shared training instead of a longer one."""
    folder = copy_reports(tmp_path_factory.mktemp('reports') / 'reports')
    (folder / '000_good/make.py').write_text((folder / 'drop_last/make.py').read_text())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder / '000_good')
        run_line(monkeypatch, 'python make.py')
        args = ['--data', 'data', '--batch-size', 5, '--epochs', 2, '--work-dir', 'good']
        run_tool(monkeypatch, 'train', '../fast.py', *args)
        shutil.copy('good/fast.py', 'good/xcit_spec_shapes.py')
    return folder


def run_line(monkeypatch, line: str) -> None:
    """Run a line of COMMAND: commands and scripts in this process, the rest by a shell."""
    name, *words = shlex.split(line, comments=True)
    if shared := SHARED.fullmatch(line):
        shutil.copytree('../000_good/good', shared[1])
        (Path(shared[1]) / 'xcit_spec_shapes.py').unlink()
    elif name == 'spec-mmdet':
        words = [str(ROOT / 'research/configs' / f'{w}.py') if w == 'experiment_pretraining' else w for w in words]
        try:
            run_tool(monkeypatch, *words)
        except SystemExit as ended:
            print(ended.code)
    elif words[:1] == ['go.py']:  # it limits its memory
        subprocess.run([sys.executable, *words], env=os.environ | dict(PYTHONPATH=str(ROOT)))
    elif name == 'python':
        sys.modules.pop('common', None)
        monkeypatch.syspath_prepend('..')
        monkeypatch.setattr(sys, 'argv', words)
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which stop.py sends to the training
        with suppress(SystemExit):
            runpy.run_path(words[0], run_name='__main__')
        signal.signal(signal.SIGTERM, before)
    else:
        subprocess.run(['bash', '-c', line])


@pytest.mark.parametrize('case', CASES)
def test_a_reported_case(monkeypatch, reports, capfd, case):
    count, parts = CASES[case]
    monkeypatch.chdir(reports / case)
    for line in Path('COMMAND').read_text().splitlines()[:count]:
        run_line(monkeypatch, line.replace('--epochs 3', '--epochs 1') if case == 'cached_mosaic' else line)
    printed = ''.join(capfd.readouterr())
    for part in parts:
        assert re.search(part, printed), part
    assert 'Traceback' not in printed
