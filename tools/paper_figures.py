"""The paper's picture: what `spec-mmdet paper-figures` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('paper-figures')
