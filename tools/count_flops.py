"""Parameters and multiply-adds of configs: what `spec-mmdet flops` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('flops')
