"""Train a detector with MMDetection's own command, its flags and --data, after checking the inputs.

python tools/train.py CONFIG [--data FOLDER] [--work-dir DIR] [--auto-scale-lr] [--resume [CHECKPOINT]] [...]
"""

from spec_mmdet.cli import run_mmdet_tool

if __name__ == '__main__':
    run_mmdet_tool('train')
