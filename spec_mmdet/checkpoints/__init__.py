"""Checkpoints: reading them without running code from them, and the layouts in which XCiTs exist."""
