"""Bytes on disk: local files, the Hub, safetensors and GGUF containers; no knowledge of models."""
