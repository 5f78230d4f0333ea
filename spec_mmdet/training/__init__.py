"""Training: loops, hooks, checkpoints, processes, the terminal and speed measurements."""
