"""Check, split or thin out a data set: what `spec-mmdet prepare` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('prepare')
