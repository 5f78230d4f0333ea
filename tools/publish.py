"""Make a folder of a detector for others: what `spec-mmdet publish` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('publish')
