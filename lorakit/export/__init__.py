"""Files that other programs read: GGUF for llama.cpp, and adapters for Ollama, MLX and servers."""
