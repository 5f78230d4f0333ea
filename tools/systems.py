"""The paper's other systems, small: what `spec-mmdet systems` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('systems')
