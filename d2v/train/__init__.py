"""Pre-training: one update, the loop around it, checkpoints, logs."""
