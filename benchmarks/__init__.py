"""Measurements of this project's software, run from a checkout. They are not installed."""
