"""Train a detector: what `spec-mmdet train` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('train')
