"""The project's own experiments, run from a checkout: see README.md. They are not installed."""
