"""The whole way on generated data: what `spec-mmdet demo` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('demo')
