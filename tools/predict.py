"""Find objects in images, folders and videos: what `spec-mmdet predict` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('predict')
