"""Test whether the conditioning helps a detector: arms, seeds, controls, and the report of their logs."""
