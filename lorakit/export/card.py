"""The card of a model: the README.md beside an adapter, a model or GGUF files.

A card is metadata for the Hub, YAML between two lines of ---, and a text for people. All that it
says is read from files: adapter_config.json, metrics.jsonl, and license and language from the card
of the base model. What is not known is left out.

A text that somebody wrote stays to the byte, and so do the metadata that are there; those that are
missing are added after them. A run that goes on may tell of its new steps: lorakit's own text ends
in a comment with its digest, and while that is right nobody has edited the text.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from lorakit.adapters.peft_files.labels import read_classifier
from lorakit.config.errors import LorakitError
from lorakit.export.card_text import Told, card_text, name_of
from lorakit.files import hub
from lorakit.files.gguf import read_header
from lorakit.files.local import as_path, read_json, write_text

Kind = Literal["adapter", "mlx", "model", "gguf", "gguf-lora"]
_LIBRARY = {"adapter": "peft", "mlx": "mlx", "model": "transformers", "gguf": "gguf"}
_LIBRARY |= {"gguf-lora": "gguf"}
_RELATION = {"adapter": "adapter", "mlx": "adapter", "model": "finetune", "gguf": "quantized"}
_RELATION |= {"gguf-lora": "adapter"}
_OF_BASE = ("license", "license_name", "license_link", "language")
_FRONT = re.compile(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.S | re.M)
_SIGNED = re.compile(r"<!-- written by lorakit ([0-9a-f]{16}) -->\s*\Z")


class Card(NamedTuple):
    """The two parts of a card."""

    metadata: dict[str, Any]
    """What the Hub reads."""
    text: str
    """What people read, signed if lorakit wrote it."""


def write_card(
    path: str | Path,
    *,
    base_model: str | None = None,
    adapter: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the README.md of an adapter, a model or GGUF files, or complete the one that is there.

    A text that somebody wrote or edited stays, and so does each of its metadata. A text of lorakit
    is written again if `settings` are given. No connection is opened.

    Args:
        path: The directory of the files.
        base_model: The model that the adapter is for, or that the files were made from: a Hub id or
            a directory. None takes what an adapter's config says.
        adapter: The directory of the adapter that was merged into the model at `path`, if one was.
        settings: More rows for the table of settings: a name -> its value.

    Returns:
        The README.md.

    Raises:
        LorakitError: The directory holds no adapter, model or GGUF file, or its README.md is no
            UTF-8 or has metadata that are no YAML. Nothing is written then.
    """
    path = as_path(path)
    old = read_card(path / hub.CARD)
    base = base_model or base_of(path)
    new = describe(path, base, adapter=adapter, settings=settings)
    text = joined(old, new, str(path / hub.CARD), rewrite=settings is not None)
    if text != old:
        write_text(path / hub.CARD, text)
    return path / hub.CARD


def read_card(file: Path) -> str | None:
    """Return the text of a card, its line ends as they are, or None if there is none.

    Raises LorakitError if it is no UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise LorakitError(f"{file} is no card, which is UTF-8 text: {error}") from None


def describe(
    path: Path,
    base: str | None,
    *,
    adapter: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    download: bool = False,
) -> Card:
    """Return the card of a directory, or of one .gguf file, as its files tell it.

    `download` says whether the Hub may be asked for the card of the base model.
    """
    kind = kind_of(path)
    of_adapter = None if adapter is None else as_path(adapter)
    if kind in ("adapter", "mlx"):
        of_adapter = path
    config = {} if of_adapter is None else read_json(of_adapter / hub.ADAPTER_FILES[0])
    known = None if base is None else hub.card_of(base, download=download)
    metadata = _metadata(kind, base, config, settings or {}, known)
    head = read_classifier(path) if kind in ("adapter", "model") else None
    if head is not None:
        metadata["pipeline_tag"] = "text-classification"
    ggufs = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    told = Told(
        path=path,
        kind=kind,
        base=base,
        base_id=metadata.get("base_model"),
        config=config,
        adapter=of_adapter,
        settings=settings or {},
        ggufs=ggufs if kind.startswith("gguf") else [],
        license=metadata.get("license"),
        head=head,
    )
    return Card(metadata, _signed(card_text(told)))


def kind_of(path: Path) -> Kind:
    """Return what a directory holds; raise LorakitError if it is nothing that lorakit knows."""
    if path.suffix == ".gguf" and path.is_file():
        return "gguf-lora" if _is_adapter(path) else "gguf"
    if not path.is_dir():
        raise LorakitError(f"{path} is neither a directory nor a .gguf file")
    config, peft, mlx = hub.ADAPTER_FILES
    if (path / config).is_file() and (path / peft).is_file():
        return "adapter"
    if (path / config).is_file() and (path / mlx).is_file():
        return "mlx"
    if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
        return "model"
    files = list(path.glob("*.gguf"))
    if files:
        return "gguf-lora" if all(map(_is_adapter, files)) else "gguf"
    raise LorakitError(
        f"{path} holds no adapter ({config} and {peft}), no model (config.json and "
        "model.safetensors) and no .gguf file"
    )


def _is_adapter(file: Path) -> bool:
    """Return whether a .gguf file says that it is an adapter."""
    try:
        return read_header(file).metadata.get("general.type") == "adapter"
    except LorakitError:  # a damaged file says nothing
        return False


def base_of(path: Path) -> str | None:
    """Return the base model that the config of an adapter names, or None."""
    file = path / hub.ADAPTER_FILES[0]
    config = read_json(file) if file.is_file() else {}
    base = config.get("base_model_name_or_path") or config.get("model")  # the second is mlx_lm's
    return base if isinstance(base, str) else None


def _metadata(
    kind: Kind,
    base: str | None,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    known: str | None,
) -> dict[str, Any]:
    """Return the metadata; `known` is the text of the card of the base model."""
    found: dict[str, Any] = {}
    repo = None if base is None else hub.hub_id(base)
    if repo is not None:
        found |= {"base_model": repo, "base_model_relation": _RELATION[kind]}
    found |= {"library_name": _LIBRARY[kind], "pipeline_tag": "text-generation"}
    of_base = _of_base(known)
    link = of_base.get("license_link")
    if isinstance(link, str) and "://" not in link:  # of a file in the repository of the base
        if repo is None:
            del of_base["license_link"]
        else:
            of_base["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    method = "lora" if kind in ("mlx", "gguf-lora") else config.get("peft_type")
    tags = [str(tag).lower() for tag in (method, "lorakit", settings.get("objective")) if tag]
    return found | of_base | {"tags": tags}


def _of_base(known: str | None) -> dict[str, Any]:
    """Return the license and the languages that the card of a base model names."""
    try:
        values = {} if known is None else split(known, "")[0]
    except LorakitError:
        return {}
    return {name: values[name] for name in _OF_BASE if values.get(name) is not None}


# ---- a card that is there ------------------------------------------------------------------------


def joined(old: str | None, new: Card, where: str, *, rewrite: bool) -> str:
    """Return a card with the metadata that it lacked, or a new card if there was none.

    Args:
        old: The card that is there, or None.
        new: What it may get.
        where: The name of `old` for messages.
        rewrite: Whether a text of lorakit that nobody has edited is replaced by that of `new`.

    Raises:
        LorakitError: The metadata of `old` are no YAML mapping.
    """
    if old is None:
        return f"---\n{_dumped(new.metadata)}---\n\n{new.text}"
    metadata, text = split(old, where)
    missing = {name: value for name, value in new.metadata.items() if name not in metadata}
    if "license" in metadata:  # the license is one thing, said with three keys
        missing = {name: value for name, value in missing.items() if "license" not in name}
    front = _FRONT.match(old)
    if front is None:
        head = f"---\n{_dumped(missing)}---\n\n" if missing else ""
    else:
        values = _extended(front.group(1), metadata, missing)
        head = old[: front.start(1)] + values + old[front.end(1) : front.end()]
    if rewrite and is_own(text):
        gap = text[: len(text) - len(text.lstrip())]
        text = gap + new.text
    return head + text


def split(card: str, where: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of a card and its text; raise LorakitError if they are no mapping."""
    front = _FRONT.match(card)
    if front is None:
        return {}, card
    try:
        values = yaml.safe_load(front.group(1))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise LorakitError(f"{where}: the metadata between the --- are no YAML: {reason}") from None
    if values is not None and not isinstance(values, dict):
        raise LorakitError(f"{where}: the metadata between the --- must map names to values")
    return values or {}, card[front.end() :]


def _extended(front: str, metadata: Mapping[str, Any], missing: Mapping[str, Any]) -> str:
    """Return the YAML `front`, which says `metadata`, with what is missing after it.

    A mapping in braces cannot go on; then all is written again.
    """
    if not missing:
        return front
    ends = "\r\n" if front.endswith("\r\n") else "\n"
    longer = front + _dumped(missing).replace("\n", ends)
    try:
        if yaml.safe_load(longer) == {**metadata, **missing}:
            return longer
    except (yaml.YAMLError, ValueError):
        pass
    return _dumped({**metadata, **missing}).replace("\n", ends)


def _dumped(metadata: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) == metadata:
        return text
    # PyYAML writes U+0085 as it is, and reads it as the end of a line
    escaped: str = yaml.safe_dump(dict(metadata), sort_keys=False)
    return escaped


def _digest(text: str) -> str:
    return blake2b(text.strip().encode(errors="replace"), digest_size=8).hexdigest()


def _signed(text: str) -> str:
    return f"{text.strip()}\n\n<!-- written by lorakit {_digest(text)} -->\n"


def is_own(text: str) -> bool:
    """Return whether lorakit wrote the text of a card, and nobody has edited it since."""
    signature = _SIGNED.search(text)
    return signature is not None and signature.group(1) == _digest(text[: signature.start()])


def addressed(card: str, path: Path, repo_id: str) -> str:
    """Return a card whose own text names the repository where it is to lie."""
    text = split(card, str(path / hub.CARD))[1]
    signature = _SIGNED.search(text)
    if signature is None or not is_own(text):
        return card
    head = card[: len(card) - len(text)]
    rest = text[: signature.start()].strip().partition("\n")[2]  # without the title
    title = repo_id.partition("/")[2]
    named = _signed(f"# {title}\n{rest.replace(name_of(path), repo_id)}")
    return f"{head}\n{named}"
