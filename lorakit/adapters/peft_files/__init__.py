"""PEFT's files: how adapters are saved, loaded, shown and converted."""
