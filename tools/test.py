"""Evaluate a detector with MMDetection's own command, its flags and --data, after checking the inputs.

python tools/test.py CONFIG CHECKPOINT [--data FOLDER] [--report DIR] [--out FILE] [--show-dir DIR] [--tta] [...]
"""

from spec_mmdet.cli import run_mmdet_tool

if __name__ == '__main__':
    run_mmdet_tool('test')
