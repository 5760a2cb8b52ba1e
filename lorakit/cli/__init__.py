"""The `lorakit` command; pyproject.toml names `main` as its entry."""

from lorakit.cli.main import main

__all__ = ["main"]
