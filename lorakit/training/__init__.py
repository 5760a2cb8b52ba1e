"""A training run: the loop, the optimizers, checkpoints, evaluation and the log."""
