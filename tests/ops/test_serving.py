"""The package serves as mmcv's compiled module if mmcv has none."""

import sys
from importlib import import_module

import mmcv
import mmcv._ext
import mmcv.ops
import pytest
import torch

from spec_mmdet.startup import OperatorFinder


def test_other_operators_say_what_is_missing():
    with pytest.raises(
        NotImplementedError, match='box_iou_rotated is a compiled operator of mmcv.*Install a compiled mmcv'
    ):
        mmcv.ops.box_iou_rotated(torch.rand(3, 5), torch.rand(3, 5))


def test_a_compiled_mmcv_takes_precedence(tmp_path, monkeypatch):
    assert [finder for finder in sys.meta_path if getattr(finder, 'serves', None) == OperatorFinder.serves]
    (tmp_path / '_ext.py').write_text('compiled = True')
    monkeypatch.setattr(mmcv, '__path__', [*mmcv.__path__, str(tmp_path)])
    monkeypatch.setattr(mmcv, '_ext', mmcv._ext)  # importing it sets these
    monkeypatch.delitem(sys.modules, 'mmcv._ext')
    assert import_module('mmcv._ext').compiled
