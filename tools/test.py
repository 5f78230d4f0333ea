"""Evaluate a detector: what `spec-mmdet test` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('test')
