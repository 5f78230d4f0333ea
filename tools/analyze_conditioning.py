"""Condition numbers of a backbone: what `spec-mmdet analyze` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('analyze')
