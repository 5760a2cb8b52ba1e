"""How good a model is: metrics, scores, plots, and what quantization costs."""
