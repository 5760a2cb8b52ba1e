"""Adapters as vLLM and SGLang want them, with the command that serves them.

Both read PEFT's files. What they read of a config is little, and differs by version: one rank, one
lora_alpha, names of layers. So `convert_adapter` writes plain LoRA first. Then

    vLLM      has its largest rank set when it starts, to one of a few numbers. The command has the
              smallest that holds the adapter
    SGLang    takes the last parts of names in target_modules alone (0.5.4 fails on others). It
              reads which layers they are in from the tensors

Source: vllm/config/lora.py of vLLM 0.32; python/sglang/srt/lora/lora_manager.py of SGLang 0.5.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lorakit.adapters.peft_files.convert import ConversionReport, check_target, convert_adapter
from lorakit.adapters.peft_files.layout import CONFIG_FILE
from lorakit.adapters.peft_files.plain import is_dora
from lorakit.adapters.peft_files.stored import StoredAdapter, open_adapter
from lorakit.config.errors import LorakitError, one_of
from lorakit.files.hub import fetch_adapter
from lorakit.files.local import as_path, read_json, write_json
from lorakit.models.config import ModelConfig
from lorakit.models.load import open_model

Server = Literal["vllm", "sglang", "peft"]
_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that was written for a server; it prints as a report and a command."""

    report: ConversionReport
    """What was written, and what was changed for it."""
    command: str | None
    """The command that serves it; None for "peft"."""
    notes: tuple[str, ...] = ()
    """What only some versions of the server do, a sentence each."""

    def __str__(self) -> str:
        lines = [str(self.report), *self.notes]
        return "\n".join(lines if self.command is None else [*lines, "", self.command])


def export_for_server(
    adapter: str | Path,
    directory: str | Path,
    *,
    server: Server = "vllm",
    base_model: str | Path | None = None,
) -> ServedAdapter:
    """Write an adapter as a server of PEFT's files wants it: plain LoRA, with short names.

    Args:
        adapter: A LoRA adapter of any kind that `load_adapter` reads, by its Hub id too. DoRA is
            approximated.
        directory: The directory to write, which must be new or empty.
        server: vllm or sglang; peft for any other program that reads PEFT's files.
        base_model: A directory, .gguf file or Hub id of the model that it was trained on; DoRA,
            fused experts and a .gguf adapter need it. None takes the name that the adapter has,
            for the command alone.

    Returns:
        What was written, and the command that serves it.

    Raises:
        LorakitError: Plain LoRA or the server has no place for something of the adapter, a file
            cannot be read, or the directory is not empty. The sentence says what to merge.
    """
    if server not in get_args(Server):
        raise LorakitError(f"server must be {one_of(get_args(Server))}, not {server!r}")
    source, directory = fetch_adapter(adapter), as_path(directory).resolve()
    check_target(source, directory)
    base = None if base_model is None else open_model(base_model)[0].config
    stored = open_adapter(source, base)
    if server == "vllm":
        _check_rank(stored)
    notes = () if server == "peft" else _vocabulary_notes(stored, base)
    report = convert_adapter(source, directory, base_model=base_model)
    values = read_json(directory / CONFIG_FILE)
    model = shlex.quote(str(base_model or values["base_model_name_or_path"] or "BASE"))
    named = shlex.quote(f"{directory.name}={directory}")
    if server == "vllm":
        rank = next(rank for rank in _RANKS_OF_VLLM if rank >= report.r)
        command = f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules {named}"
        return ServedAdapter(report, command, notes)
    if server == "sglang":
        endings = dict.fromkeys(name.rpartition(".")[2] for name in values["target_modules"])
        write_json(directory / CONFIG_FILE, values | {"target_modules": list(endings)})
        command = (
            f"python -m sglang.launch_server --model-path {model} --enable-lora "
            f"--lora-paths {named}"
        )
        return ServedAdapter(report, command, notes)
    return ServedAdapter(report, None)


def _check_rank(stored: StoredAdapter) -> None:
    """Raise LorakitError if plain LoRA of the adapter is of a larger rank than vLLM has."""
    largest = max((layer.rank for layer in stored.layers), default=0)
    rank = 2 * largest if is_dora(stored) else largest
    if rank > _RANKS_OF_VLLM[-1]:
        raise LorakitError(
            f"{stored.path}: rank {rank} is more than vLLM's largest, {_RANKS_OF_VLLM[-1]}: merge "
            "the adapter (lorakit merge)"
        )


def _vocabulary_notes(stored: StoredAdapter, base: ModelConfig | None) -> tuple[str, ...]:
    """Return a sentence if embedding or head is adapted; refuse those of a tied model."""
    found = [layer.name for layer in stored.layers if layer.name.endswith(_VOCABULARY)]
    if not found:
        return ()
    if base is not None and base.tie_word_embeddings:
        raise LorakitError(
            f"{stored.path}: {found[0]} is adapted, and embedding and head of the base model are "
            "one weight, which servers cannot change for one of them: merge the adapter (lorakit "
            "merge)"
        )
    are = "is" if len(found) == 1 else "are"
    return (f"{' and '.join(found)} {are} adapted, which servers support for some models only",)
