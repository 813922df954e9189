"""Training: the optimizer, the step, the loop, checkpoints and logs."""
