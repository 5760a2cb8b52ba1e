"""The files of a tokenizer in a Hugging Face directory: reading them, and writing them again.

Several files say the same thing, each for other readers:

    vocabulary        tokenizer.json says all of it. tokenizer.model (SentencePiece), vocab.json and
                      merges.txt, added_tokens.json, tekken.json are what converters to GGUF, slow
                      tokenizers and mistral-common read.
    special tokens    tokenizer_config.json, and in older directories special_tokens_map.json
    chat template     chat_template.jinja and additional_chat_templates/, or tokenizer_config.json,
                      or chat_template.json

lorakit reads tokenizer.json, or else tekken.json (tekken.py). A file that goes along is copied byte
for byte while the tokenizer is what its directory says. A tokenizer that was changed is written
into tokenizer.json, tokenizer_config.json and chat_template.jinja; the other files that would
contradict them stay away.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from lorakit.config.errors import LorakitError
from lorakit.files.hub import VOCABULARY_FILES
from lorakit.files.local import copy_file, read_json, read_text, write_json, write_text
from lorakit.models.tekken import read_tekken

log = logging.getLogger("lorakit")
# Which files say what, beside tokenizer_config.json, which says of each.
_FILES = {
    "vocabulary": ["tokenizer.json", *VOCABULARY_FILES],
    "special tokens": ["special_tokens_map.json"],
    "chat template": [
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
    ],
}
# Keys of tokenizer_config.json that say how to make a tokenizer of the vocabulary as it was.
_OF_OLD_VOCABULARY = (
    "tokenizer_class",
    "auto_map",
    "added_tokens_decoder",
    "add_bos_token",
    "add_eos_token",
)


class TokenizerParts(NamedTuple):
    """What the files of a tokenizer say."""

    backend: tokenizers.Tokenizer
    """The tokenizer of the `tokenizers` library."""
    special_tokens: dict[str, str]
    """The texts of the special tokens, by their names."""
    chat_template: str | Mapping[str, str] | None
    """The chat template, or several by their names."""


def read_parts(path: Path) -> TokenizerParts:
    """Read a tokenizer from a directory.

    Raises LorakitError if tokenizer.json and tekken.json are missing, or a file is damaged.
    """
    special: dict[str, str] = {}
    if (path / "tokenizer.json").exists():
        backend = _backend(path / "tokenizer.json")
    elif (path / "tekken.json").exists():
        backend, special = read_tekken(path / "tekken.json")
    else:
        raise LorakitError(f"{path}: tokenizer.json is missing")
    config = _read_optional(path / "tokenizer_config.json")
    for name, value in (_read_optional(path / "special_tokens_map.json") | config).items():
        text = _text(value)
        if name.endswith("_token") and text is not None:
            special[name] = text
    return TokenizerParts(backend, special, _template(path, config))


def _backend(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for any parse error
        raise LorakitError(f"{file} is not a valid tokenizer: {error}") from None
    backend.no_truncation()  # limits of a training run that some repositories have kept
    backend.no_padding()
    return backend


def read_template(path: Path) -> str | dict[str, str] | None:
    """Return the chat template in a directory, or several by name; None if it holds none.

    The directory need not hold a tokenizer: that of an adapter has a template alone. Raises
    LorakitError if a file is damaged.
    """
    return _template(path, _read_optional(path / "tokenizer_config.json"))


def write_template(template: str | Mapping[str, str] | None, path: Path) -> None:
    """Write a chat template into a directory, as `read_template` reads it.

    Several go into chat_template.jinja and additional_chat_templates/, as transformers has them. If
    there is none, that of an earlier save is removed.
    """
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    if "default" in named:
        write_text(path / "chat_template.jinja", named["default"])
    else:
        (path / "chat_template.jinja").unlink(missing_ok=True)
    for name, text in named.items():
        if name != "default":
            (path / "additional_chat_templates").mkdir(exist_ok=True)
            write_text(path / "additional_chat_templates" / f"{name}.jinja", text)


def _text(token: Any) -> str | None:
    """Return the text of a special token, which may be an object; None for anything else."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _template(path: Path, config: Mapping) -> str | dict[str, str] | None:
    """Return the directory's chat template, or several by name.

    It is chat_template.jinja (with those of additional_chat_templates/), or else the one in
    tokenizer_config.json, or else the one in the older chat_template.json.
    """
    if (path / "chat_template.jinja").exists():
        default = read_text(path / "chat_template.jinja")
        extra = sorted((path / "additional_chat_templates").glob("*.jinja"))
        more = {file.stem: read_text(file) for file in extra}
        return {"default": default, **more} if more else default
    template = config.get("chat_template")
    if template is None:
        template = _read_optional(path / "chat_template.json").get("chat_template")
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        texts = template.values() if isinstance(template, dict) else [template or ""]
        if all(isinstance(text, str) for text in texts):
            return template
    except (TypeError, KeyError):
        pass
    raise LorakitError(f"{path}: chat_template must be text, or a list of names and templates")


def _read_optional(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, which is empty if the file is missing."""
    return read_json(path) if path.exists() else {}


# ---- writing -------------------------------------------------------------------------------------


def write_parts(parts: TokenizerParts, path: Path, source: Path | None) -> None:
    """Write a tokenizer into a directory, with the files of its source that say the same.

    The files of the source that say otherwise are left out, and a line in the log names them. If an
    earlier save left copies of them in `path`, these are removed. So are other chat templates
    there, which a reader would take for this tokenizer's.

    Args:
        parts: The tokenizer.
        path: The directory, which exists.
        source: The directory that the tokenizer was read from, or None.
    """
    before = _read_source(source)
    changed = [
        kind
        for kind, old, new in zip(_FILES, _comparable(before), _comparable(parts), strict=True)
        if before is None or old != new
    ]
    written = _write_changed(parts, path, changed)
    left_out = []
    if source is not None and before is not None:
        for kind, patterns in _FILES.items():
            for name in _found(source, patterns):
                if kind not in changed:
                    copy_file(source / name, path / name)
                    written.append(name)
                elif name not in written:
                    left_out.append(name)
                    _remove_copy(source / name, path / name)
    _write_config(parts, path, source, before, changed)
    for name in _found(path, _FILES["chat template"]):
        if name not in written:
            (path / name).unlink()
    if left_out:
        log.warning(
            "lorakit: %s: the tokenizer was changed; these files of %s say otherwise and did not "
            "go along: %s",
            path,
            source,
            ", ".join(left_out),
        )


def _read_source(source: Path | None) -> TokenizerParts | None:
    """Return what the source says now, or None if there is none, or none that can be read."""
    if source is None:
        return None
    try:
        return read_parts(source)
    except LorakitError as error:
        log.warning("lorakit: %s; the tokenizer is written without the files beside it", error)
        return None


def _comparable(parts: TokenizerParts | None) -> tuple[Any, Any, Any]:
    """Return what files say of each kind in _FILES."""
    if parts is None:
        return None, None, None
    return parts.backend.to_str(), parts.special_tokens, parts.chat_template


def _found(path: Path, patterns: list[str]) -> list[str]:
    """Return the names of the files in a directory that fit one of the patterns."""
    files = [file for pattern in patterns for file in path.glob(pattern) if file.is_file()]
    return sorted({file.relative_to(path).as_posix() for file in files})


def _write_changed(parts: TokenizerParts, path: Path, changed: list[str]) -> list[str]:
    """Write what the source does not say, but for the configuration; return the files' names."""
    written = []
    if "vocabulary" in changed:
        write_text(path / "tokenizer.json", parts.backend.to_str(pretty=True))
        written.append("tokenizer.json")
    if "chat template" in changed and isinstance(parts.chat_template, str):
        write_text(path / "chat_template.jinja", parts.chat_template)
        written.append("chat_template.jinja")
    return written


def _remove_copy(file: Path, copy: Path) -> None:
    """Remove the copy of a file, if there is one and it is another file."""
    if copy.is_file() and not copy.samefile(file) and copy.read_bytes() == file.read_bytes():
        copy.unlink()


def _write_config(
    parts: TokenizerParts,
    path: Path,
    source: Path | None,
    before: TokenizerParts | None,
    changed: list[str],
) -> None:
    """Write tokenizer_config.json: a copy of the source's, if it says the same."""
    given: dict[str, Any] = {}
    if source is not None and before is not None:
        given = _read_optional(source / "tokenizer_config.json")
    config = dict(given)
    if "vocabulary" in changed:  # tokenizer.json alone says what it is
        config = {key: value for key, value in given.items() if key not in _OF_OLD_VOCABULARY}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "special tokens" in changed:
        gone = () if before is None else before.special_tokens.keys() - parts.special_tokens.keys()
        config = {key: value for key, value in config.items() if key not in gone}
        for name, text in parts.special_tokens.items():
            if _text(config.get(name)) != text:
                config[name] = text
    if "chat template" in changed:
        config.pop("chat_template", None)
        if isinstance(parts.chat_template, Mapping):
            named = parts.chat_template.items()
            config["chat_template"] = [{"name": n, "template": text} for n, text in named]
    if source is not None and config == given and (source / "tokenizer_config.json").is_file():
        copy_file(source / "tokenizer_config.json", path / "tokenizer_config.json")
    else:
        write_json(path / "tokenizer_config.json", config)
