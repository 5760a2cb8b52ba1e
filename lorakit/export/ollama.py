"""A directory for Ollama: GGUF files, and what Ollama should know of the model.

    NAME-Q4_K_M.gguf      the model, with the adapter merged into it or not
    NAME-lora-F16.gguf    the adapter, if it stays apart
    Modelfile             FROM, ADAPTER, TEMPLATE, SYSTEM and PARAMETER, for `ollama create`
    template, system,     the same for a repository on the Hub, from which
    params                `ollama run hf.co/USER/REPOSITORY` takes them

TEMPLATE is there if go_template.py finds one. Without it Ollama from 0.30 on runs the chat template
in the GGUF file. Facts: Ollama's docs/modelfile.mdx, and docs/hub/ollama of the Hub.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config.errors import LorakitError
from lorakit.export.gguf import GgufFile, export_gguf
from lorakit.export.gguf_adapter import export_gguf_adapter
from lorakit.export.go_template import go_template, lost_in_modelfile
from lorakit.export.importance import Importance
from lorakit.files.hub import fetch_adapter, name_of
from lorakit.files.local import as_path, read_json, write_text
from lorakit.models.load import open_model
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import adapted_tokenizer, brings

# Names in generation_config.json -> Ollama's.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class OllamaFiles:
    """A directory for Ollama that was written; it prints as its files and two commands."""

    directory: Path
    """The directory."""
    gguf: tuple[GgufFile, ...]
    """The model's file, and the adapter's if it stays apart."""
    no_template: str
    """Why there is no TEMPLATE; "" if there is one."""
    commands: tuple[str, str]
    """What makes the model known to Ollama, and what runs it."""

    def __str__(self) -> str:
        lines = [str(file) for file in self.gguf]
        if self.no_template:
            lines.append(
                f"no TEMPLATE ({self.no_template}): Ollama before 0.30 has no chat for this model"
            )
        return "\n".join([*lines, "", *self.commands])


def export_ollama(
    model: str | Path,
    directory: str | Path,
    *,
    quantization: str = "q4_k_m",
    adapter: str | Path | None = None,
    merge: bool = True,
    system: str | None = None,
    context_length: int | None = None,
    imatrix: Importance | str | Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    name: str | None = None,
) -> OllamaFiles:
    """Write a model for Ollama, with or without an adapter.

    Args:
        model: A directory, .gguf file or Hub id.
        directory: The directory to write.
        quantization: That of the model's file, as in `export_gguf`.
        adapter: The directory, .gguf file or Hub id of an adapter.
        merge: Merge the adapter into the model's file, or write it as a file of its own.
        system: A system prompt for chats that have none.
        context_length: The positions that Ollama makes room for, and that the file states.
        imatrix: As in `export_gguf`.
        tensor_types: As in `export_gguf`.
        name: What the files and the model are called. None takes the name of the model's directory.

    Returns:
        What was written, with the commands that run it.

    Raises:
        LorakitError: `export_gguf` or `export_gguf_adapter` refuses something, or the system prompt
            cannot stand in a Modelfile.
        OSError: The disk is full.
    """
    if lost := lost_in_modelfile(system or ""):
        raise LorakitError(f"system: a Modelfile has no way to write {lost}; leave it out")
    directory, called = as_path(directory), (name or name_of(model)).replace("/", "-")
    adapter = None if adapter is None else fetch_adapter(adapter)
    tok = adapted_tokenizer(model, adapter)
    own = brings(adapter, "tokenizer.json") or brings(adapter, "chat_template.jinja")
    template, why = go_template(tok)
    parameters = _parameters(model, tok, context_length)
    written = export_gguf(
        model,
        directory / f"{called}-{quantization.upper()}.gguf",
        quantization=quantization,
        adapter=adapter if merge else None,
        tokenizer=None if merge or not own else tok,  # merged, the adapter's is taken
        imatrix=imatrix,
        tensor_types=tensor_types,
        name=name,
        context_length=context_length,
    )
    files = [written]
    if adapter is not None and not merge:
        file = directory / f"{called}-lora-F16.gguf"
        files.append(export_gguf_adapter(adapter, file, base_model=model, name=name))
    _write(directory, files, template, system, parameters)
    return OllamaFiles(directory, tuple(files), why, _commands(directory, called))


def _commands(directory: Path, name: str) -> tuple[str, str]:
    """Return what makes a model known to Ollama by a name that it allows, and what runs it."""
    called = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"
    create = f"ollama create {called} -f {shlex.quote(str(directory / 'Modelfile'))}"
    return create, f"ollama run {called}"


def _parameters(model: str | Path, tok: Tokenizer, context_length: int | None) -> dict[str, Any]:
    """Return Ollama's parameters: where answers end, and how the model wants to be sampled."""
    texts = [tok.backend.id_to_token(token) for token in tok.end_token_ids]
    found: dict[str, Any] = {"stop": [text for text in texts if text and '"' not in text]}
    source = open_model(model)[2]
    file = source.path / "generation_config.json"
    if file.is_file():
        values = read_json(file)
        for theirs, ollamas in _SAMPLING.items():
            value = values.get(theirs)
            if type(value) in (int, float) and values.get("do_sample") is not False:
                found[ollamas] = value
    if context_length is not None:
        found["num_ctx"] = context_length
    return {key: value for key, value in found.items() if value != []}


def _write(
    directory: Path,
    files: list[GgufFile],
    template: str | None,
    system: str | None,
    parameters: dict[str, Any],
) -> None:
    """Write the Modelfile, and the files that the Hub has for the same."""
    lines = [
        f"{word} ./{file.path.name}" for word, file in zip(("FROM", "ADAPTER"), files, strict=False)
    ]
    for word, text in ("TEMPLATE", template), ("SYSTEM", system):
        beside = directory / word.lower()
        if text is None:
            beside.unlink(missing_ok=True)  # of an earlier export
        else:
            lines.append(f'{word} """{text}"""')
            write_text(beside, text)
    for key, value in parameters.items():
        if key == "stop":
            lines += [f'PARAMETER stop "{text}"' for text in value]
        else:
            lines.append(f"PARAMETER {key} {value}")
    write_text(directory / "Modelfile", "\n".join(lines) + "\n")
    write_text(directory / "params", json.dumps(parameters, ensure_ascii=False, indent=2) + "\n")
