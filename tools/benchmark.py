"""Time and memory of backbones and detectors: what `spec-mmdet benchmark` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('benchmark')
