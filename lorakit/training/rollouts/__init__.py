"""Completions that the model in training makes, their rewards, and steps that learn of them."""
