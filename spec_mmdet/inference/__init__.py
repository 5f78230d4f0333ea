"""Trained detectors in use: prediction on files, ONNX, and folders for other users."""
