"""Write the generated data: what `spec-mmdet shapes` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('shapes')
