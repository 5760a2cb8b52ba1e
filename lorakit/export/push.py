"""Uploading an adapter, a model or GGUF files to the Hub, with its card.

Only files that lorakit knows are uploaded: weights, config, tokenizer, card, and a license beside
them. The state of an optimizer, checkpoints, logs and whatever else lies there stay.

The README.md of the repository is replaced by the one here, unless somebody wrote that one and
lorakit this one. Then only metadata are added.
"""

import logging
from pathlib import Path

from lorakit.config.errors import LorakitError
from lorakit.export import card
from lorakit.files import hub
from lorakit.files.local import as_path, write_text

log = logging.getLogger("lorakit")

_BESIDE = ["LICENSE*", "NOTICE*"]
_OLLAMA = ["Modelfile", "template", "params", "system"]
_MODEL = [*hub.MODEL_FILES, *hub.PROCESSOR_FILES, "additional_chat_templates/*.jinja"]
_KNOWN = {
    "adapter": [*hub.ADAPTER_FILES, hub.LABELS, *hub.TOKENIZER_FILES],
    "mlx": [*hub.ADAPTER_FILES, *hub.TOKENIZER_FILES],
    "model": [*_MODEL, *hub.TOKENIZER_FILES],
    "gguf": ["*.gguf", *_OLLAMA],
    "gguf-lora": ["*.gguf"],
}


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    message: str | None = None,
    checkpoint: Path | None = None,
) -> str:
    """Upload an adapter, a model or GGUF files to the Hub, as one commit.

    A directory without a README.md gets one first (see `write_card`).

    Args:
        path: The directory, or one .gguf file.
        repo_id: The repository, "organization/name". It is made if it is missing.
        private: Whether the repository is private; None takes the organization's default.
        revision: The branch, which is made if it is missing; None takes the main one.
        base_model: The Hub id of the model that the files were made from. None takes what an
            adapter's config says.
        message: The message of the commit.
        checkpoint: The directory of a checkpoint of a run to upload too, as last-checkpoint.

    Returns:
        The address of the repository.

    Raises:
        LorakitError: `path` holds nothing that lorakit knows, `repo_id` is no such name, the Hub
            cannot be reached or refuses, or the repository is public and `private` is true. What
            is on the disk stays as it is.
    """
    path = as_path(path)
    if hub.hub_id(f"{repo_id}:any") is None or ":" in repo_id:
        raise LorakitError(f"{repo_id!r} is no repository: give organization/name")
    kind = card.kind_of(path)
    base = base_model or card.base_of(path)
    if path.is_dir():
        card.split(card.read_card(path / hub.CARD) or "", str(path / hub.CARD))
        files = {file.relative_to(path).as_posix(): file for file in _known(path, kind)}
    else:
        files = {path.name: path}
    if checkpoint is not None:
        files |= {f"last-checkpoint/{file.name}": file for file in checkpoint.iterdir()}
    return hub.upload(
        path,
        repo_id,
        files,
        lambda there: _wanted(card.addressed(_own_card(path, base), path, repo_id), there, repo_id),
        private=private,
        revision=revision,
        message=message or f"Upload {path.absolute().name} with lorakit",
    )


def _own_card(path: Path, base: str | None) -> str:
    """Return the card of the files, written or completed on the disk if `path` is a directory.

    The Hub is asked about the base model.
    """
    if base is not None and hub.hub_id(base) is not None and not hub.is_on_hub(base):
        base = None  # a directory that is not here any more
    old = None if path.is_file() else card.read_card(path / hub.CARD)
    new = card.describe(path, base, download=True)
    text = card.joined(old, new, str(path / hub.CARD), rewrite=False)
    if path.is_dir() and text != old:
        write_text(path / hub.CARD, text)
    _say_license(new.metadata.get("license"))
    return text


def _wanted(own: str, there: str | None, repo_id: str) -> str:
    """Return the card that a repository gets which has the card `there`."""
    if there is None:
        return own
    metadata, text = card.split(own, hub.CARD)
    if not card.is_own(text) or card.is_own(card.split(there, f"{repo_id}/{hub.CARD}")[1]):
        return own
    log.warning("lorakit: %s has a README.md of its own, which stays", repo_id)
    return card.joined(there, card.Card(metadata, text), f"{repo_id}/{hub.CARD}", rewrite=False)


def _known(path: Path, kind: card.Kind) -> list[Path]:
    """Return the files of a directory that are uploaded, each once."""
    found = [file for pattern in [*_KNOWN[kind], *_BESIDE] for file in path.glob(pattern)]
    return sorted({file for file in found if file.is_file()})


def _say_license(name: object) -> None:
    """Remind of a license of the base model that may ask for a name or a notice."""
    if str(name) == "other" or str(name).startswith(("llama", "gemma")):
        log.warning(
            "lorakit: the license of the base model is %s: read what it asks of those who share "
            "what is made from it, such as a name in the title or a notice",
            name,
        )
