"""Train a detector with MMDetection's own command, its flags unchanged, after checking the inputs.

python tools/train.py CONFIG [--work-dir DIR] [--amp] [--auto-scale-lr] [--resume [CHECKPOINT]] [--cfg-options ...]
"""

from spec_mmdet.cli import run_mmdet_tool

if __name__ == '__main__':
    run_mmdet_tool('train')
