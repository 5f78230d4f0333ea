"""Use trained detectors: predict on files, export to ONNX, analyse and publish."""
