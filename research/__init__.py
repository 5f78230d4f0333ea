"""The project's own experiments, run from a checkout: see README.md. Nothing here is installed."""
