"""Data sets in COCO's format: their folders and classes, the checks before a run, and generated ones."""
