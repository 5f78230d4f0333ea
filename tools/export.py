"""Write a detector's backbone as ONNX: what `spec-mmdet export` does."""

from spec_mmdet.commands import run

if __name__ == '__main__':
    run('export')
