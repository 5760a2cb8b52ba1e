"""The decoder: its layers, its configuration, its tokenizer, and how models are read and saved."""
