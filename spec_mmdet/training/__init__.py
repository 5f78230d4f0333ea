"""What MMEngine runs beside the training."""
