"""Measurements of this project itself, run from a checkout. Nothing here is installed."""
