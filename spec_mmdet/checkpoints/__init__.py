"""Read checkpoints without running code from them, and convert the layouts of XCiT checkpoints."""
