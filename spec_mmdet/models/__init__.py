"""The registered models: the backbone, its attention, classifiers, and modules for padding, ONNX and augmentation."""
