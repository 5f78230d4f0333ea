"""Evaluation: a faster metric, and a page that shows the results."""
