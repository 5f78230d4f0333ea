"""Does the conditioning help a detector: what `spec-mmdet experiment` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('experiment')
