"""Convert a checkpoint of XCiT: what `spec-mmdet convert` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('convert')
