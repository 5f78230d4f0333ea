"""Time the two evaluators: what `spec-mmdet benchmark-evaluator` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('benchmark-evaluator')
