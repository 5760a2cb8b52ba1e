"""The objectives: what a batch costs."""
