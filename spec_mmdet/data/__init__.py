"""Data sets in COCO's format: folders, classes, checks before a run, and generated data."""
