"""Learn a few images by heart: what `spec-mmdet overfit` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('overfit')
