"""Text from a model: the key-value cache, decoding and generation."""
