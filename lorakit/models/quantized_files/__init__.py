"""Weights that other tools quantized, as their files store them, read as dense ones."""
