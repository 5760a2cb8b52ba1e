"""A training run: the loop, the losses, the optimizer, checkpoints and the log."""
