"""Carried out of lorakit/adapter.py."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

PATTERNS = ("rank_pattern", "alpha_pattern")
