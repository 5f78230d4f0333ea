"""Compare trainings: what `spec-mmdet compare` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('compare')
