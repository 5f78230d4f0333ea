"""Does the conditioning help a detector? Arms, seeds, controls, and the report of their logs."""
