"""Pretrain a backbone: what `spec-mmdet pretrain` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('pretrain')
