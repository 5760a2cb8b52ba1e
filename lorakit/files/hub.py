"""A model's files and where they are: in a directory, in a .gguf file, or on the Hub.

The files of a Hub id are taken from the Hub's cache on this machine, or downloaded into it. This is
the only module that opens a connection, and it asks only for the id that the user gave. Callers
name the files that they want: safetensors, JSON, templates and vocabularies, never pickled weights
or code.
"""

import re
from pathlib import Path

from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path

# The files of a model and of its tokenizer, as patterns. "*.safetensors" would be too wide: some
# repositories keep the same weights a second time under another name.
MODEL_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model*.index.json"]
# What transformers reads to make pixels and samples into the input of a multimodal model:
# preprocessor_config.json, processor_config.json, video_preprocessor_config.json.
PROCESSOR_FILES = ["*processor_config.json"]
# The vocabulary in the forms that others read. lorakit only hands these files on. The names are
# those of transformers' tokenizer classes (VOCAB_FILES_NAMES) and of Mistral's repositories
# (tokenizer.model.v3).
VOCABULARY_FILES = ["tokenizer.model", "tokenizer.model.v*", "spiece.model", "added_tokens.json"]
VOCABULARY_FILES += ["vocab.json", "merges.txt", "tekken.json"]
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "*.jinja", "chat_template.json"]
TOKENIZER_FILES += VOCABULARY_FILES


def resolve(path_or_hub_id: str | Path, patterns: list[str]) -> Path:
    """Return the local directory or .gguf file that holds the files.

    A path that exists is returned as it is. Only a string of the form "organization/name" that is
    no path here is taken for a Hub id.

    Args:
        path_or_hub_id: A directory, a .gguf file or a Hub id.
        patterns: The files to fetch of a Hub id: names in which * stands for any text.

    Raises:
        LorakitError: If the path is neither a directory nor a .gguf file, or the Hub does not give
            the files.
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
