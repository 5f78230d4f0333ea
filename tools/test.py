"""Evaluate a detector with MMDetection's own command, its flags unchanged, after checking the inputs.

python tools/test.py CONFIG CHECKPOINT [--report DIR] [--out FILE] [--show-dir DIR] [--tta] [--work-dir DIR]
                     [--cfg-options ...]
"""

from spec_mmdet.cli import run_mmdet_tool

if __name__ == '__main__':
    run_mmdet_tool('test')
