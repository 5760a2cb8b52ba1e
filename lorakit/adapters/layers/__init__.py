"""The modules that stand in a model while an adapter is attached."""
