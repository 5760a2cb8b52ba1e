"""Where a model's files are: a directory, a .gguf file, or a Hub id, which is downloaded or found
in the cache.

This is the only module that opens a connection, and only to the id that the user gave.
"""

import re
from pathlib import Path

from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path

# not "*.safetensors": some repositories keep the same weights a second time under another name
WEIGHTS = ["config.json", "generation_config.json", "model*.safetensors", "model*.index.json"]
TOKENIZER = ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "chat_template.json"]


def resolve(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """A local directory, or a .gguf file. For a Hub id, the files that match `patterns` are
    fetched.

    What exists on disk is taken as it is; only a string of the form "organization/name" is asked of
    the Hub. Raises LorakitError if there is no such thing in either place.
    """
    path = as_path(path_or_hub_id)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise LorakitError(f"{path} is neither a model directory nor a .gguf file")
    text = str(path_or_hub_id)
    if path.suffix == ".gguf" or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        raise LorakitError(f"{path} does not exist")

    if re.match(r"meta-llama/(meta-)?llama-?3\.3-(1|3|8)b", text, re.IGNORECASE):
        raise LorakitError(
            f"{text!r} does not exist: Llama 3.3 was published with 70B parameters only; 8B is "
            "Llama 3.1, 1B and 3B are Llama 3.2"
        )

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LorakitError(
            f"{text!r} is no directory here, and the Hub did not give it: {reason}"
        ) from error
