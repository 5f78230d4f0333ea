"""The package as mmcv's compiled module, where mmcv has none."""

import subprocess
import sys

import mmcv.ops
import pytest
import torch


def test_other_operators_say_what_is_missing():
    with pytest.raises(
        NotImplementedError, match='box_iou_rotated is a compiled operator of mmcv.*Install a compiled mmcv'
    ):
        mmcv.ops.box_iou_rotated(torch.rand(3, 5), torch.rand(3, 5))


def test_a_compiled_mmcv_takes_precedence(tmp_path):
    (tmp_path / '_ext.py').write_text('compiled = True\ndef __getattr__(name): return print')
    code = (
        f'import mmcv; mmcv.__path__.append({str(tmp_path)!r})\n'
        'import spec_mmdet, mmcv._ext; assert mmcv._ext.compiled and mmcv._ext.nms is print'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
