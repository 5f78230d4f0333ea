"""What is registered as a model: the backbone, its attention, and what masks and merges around it."""
