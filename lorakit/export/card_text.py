"""The text of a model's card: how to load it, its settings, its losses and its scores.

Each number stands in a file of the run or in the settings that were given. Nothing else is claimed.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.config.classifier import ClassifierConfig

_STRETCHES = 10  # rows of the table of losses, and the most rows of that of evaluations
# What a card tells of adapter_config.json, where it is set.
_OPTIONS = ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"]
_OPTIONS += ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "num_virtual_tokens"]
_OPTIONS += ["fine_tune_type", "num_layers", "lora_parameters"]  # of mlx_lm
# The end of a file's name that llama.cpp and Ollama take for its quantization.
_QUANTIZATION = re.compile(r"-((?:I?Q\d\w*|B?F16|F32))$", re.IGNORECASE)


class Told(NamedTuple):
    """What a card is written from."""

    path: Path
    """The directory of the files, or one .gguf file."""
    kind: str
    """What they are: "adapter", "mlx", "model", "gguf" or "gguf-lora"."""
    base: str | None
    """The model that they were made from: a Hub id or a directory."""
    base_id: str | None
    """Its Hub id, if it has one."""
    config: Mapping[str, Any]
    """adapter_config.json, or nothing."""
    adapter: Path | None
    """The directory of the adapter, if there is one."""
    settings: Mapping[str, Any]
    """More settings: a name -> its value."""
    ggufs: Sequence[Path]
    """The GGUF files."""
    license: Any
    """The license of the base model."""
    head: ClassifierConfig | None = None
    """What the outputs of a head for classes are, if there is one."""


def name_of(path: Path) -> str:
    """Return what stands in a card for the place of its files, until they lie on the Hub."""
    return f"path/to/{path.absolute().name.removesuffix('.gguf')}"


def card_text(told: Told) -> str:
    """Return the text of a card, as Markdown."""
    title = told.path.absolute().name.removesuffix(".gguf")
    parts = [f"# {title}", _first_sentence(told), "## How to load it", _loading(told)]
    if told.head and not told.head.regression:
        parts.insert(2, f"It tells the classes {', '.join(map(_cell, told.head.labels[:100]))}.")
    settings = _settings(told)
    if settings:
        parts += ["## Settings", table(["setting", "value"], settings)]
    losses, evaluations = _metrics(told.adapter)
    if losses:
        parts += ["## Training loss", "Means over the steps."]
        parts.append(table(["steps", "loss", "learning rate"], _stretches(losses)))
    if evaluations:
        parts += ["## Evaluation", "On the validation rows."]
        parts.append(_evaluated(evaluations))
    parts += ["## Limits", "Nothing beyond the numbers on this page was measured."]
    if told.license is not None:
        parts.append(
            f"The license of the base model is `{told.license}`. It may ask those who share what "
            "is made from it for a name, a notice or a copy of its text."
        )
    return "\n\n".join(parts)


def _base(told: Told) -> str:
    """Return the base model as code loads it: its Hub id, or a place for its directory."""
    if told.base_id is not None:
        return told.base_id
    return "path/to/the-base-model" if told.base is None else f"path/to/{Path(told.base).name}"


def _first_sentence(told: Told) -> str:
    base = ""
    if told.base_id is not None:
        base = f"[{told.base_id}](https://huggingface.co/{told.base_id})"
    elif told.base is not None:
        base = f"`{Path(told.base).name}`"
    method = told.config.get("peft_type") or ("LoRA" if told.config else None)
    if told.kind in ("adapter", "mlx"):
        return f"An adapter ({method}){f' for {base}' if base else ''}, of lorakit."
    if told.kind == "gguf":
        return f"GGUF files{f' of {base}' if base else ''}, for llama.cpp, Ollama and LM Studio."
    if told.kind == "gguf-lora":
        return f"An adapter (LoRA){f' for {base}' if base else ''}, for llama.cpp and Ollama."
    merged = f", with an adapter ({method}) merged into its weights" if method else ""
    return f"A model{f' made from {base}' if base else ''}{merged}, of lorakit."


def _loading(told: Told) -> str:
    place, base = name_of(told.path), _base(told)
    if told.ggufs:
        sizes = [(file.name, f"{file.stat().st_size / 1e6:,.1f}") for file in told.ggufs]
        if told.kind == "gguf-lora":
            file = told.ggufs[0].name
            lines = [f"hf download {place} {file} --local-dir ."]
            lines += [f"llama-server -m MODEL.gguf --lora {file}"]
            return f"{table(['file', 'MB'], sizes)}\n\n{_code('sh', lines)}"
        quantization = _QUANTIZATION.search(told.ggufs[0].stem)
        tagged = f"{place}:{quantization.group(1)}" if quantization else place
        lines = [f"llama-server -hf {tagged}", f"ollama run hf.co/{tagged}"]
        return f"{table(['file', 'MB'], sizes)}\n\n{_code('sh', lines)}"
    if told.kind == "model":
        lines = ["import lorakit as lk", "", f'tok = lk.load_tokenizer("{place}")']
        lines += [f'model = lk.load_model("{place}")', _used(told)]
        served = [] if told.head else [_code("sh", [f"vllm serve {place}"])]
        return "\n\n".join([_code("python", lines), *served])
    tokenizer = f'tok = lk.load_tokenizer("{base}")'
    if (told.path / "tokenizer.json").is_file():
        tokenizer = f'tok = lk.load_tokenizer("{place}")'
    elif (told.path / "chat_template.jinja").is_file():
        tokenizer = f'tok = lk.load_tokenizer("{base}", chat_template=lk.fetch_adapter("{place}"))'
    lines = ["import lorakit as lk", "", tokenizer, f'model = lk.load_model("{base}")']
    if told.head:
        lines[-1] = f'head = lk.read_classifier("{place}")'
        lines += [f'model = lk.load_model("{base}", classifier=head)']
    lines += [f'lk.load_adapter(model, "{place}")', _used(told)]
    found = [_code("python", lines)]
    if told.kind == "adapter":
        kind, count = "AutoModelForCausalLM", ""
        if told.head:
            kind, count = (
                "AutoModelForSequenceClassification",
                f", num_labels={len(told.head.labels)}",
            )
        lines = ["from peft import PeftModel", f"from transformers import {kind}", ""]
        lines += [f'model = {kind}.from_pretrained("{base}"{count})']
        lines += [f'model = PeftModel.from_pretrained(model, "{place}")']
        found += ["With PEFT:", _code("python", lines)]
    return "\n\n".join(found)


_PREDICT = 'print(lk.predict(model, tok, ["Hello"]))'
_GENERATE = 'print(lk.generate(model, tok, [{"role": "user", "content": "Hello"}]))'


def _used(told: Told) -> str:
    return _PREDICT if told.head else _GENERATE


def _settings(told: Told) -> list[tuple[str, str]]:
    """Return the rows of the table of settings: the adapter's, then those that were given."""
    unset: tuple[Any, ...] = (None, False, {}, [])
    of_adapter = {n: told.config[n] for n in _OPTIONS if told.config.get(n) not in unset}
    return [(name, _shown(value)) for name, value in {**of_adapter, **told.settings}.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple, set)):
        return ", ".join(sorted(map(str, value)) if isinstance(value, set) else map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metrics(adapter: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of an adapter's metrics.jsonl that tell of steps, and of evaluations."""
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    text = ""
    if adapter is not None and (adapter / "metrics.jsonl").is_file():
        text = (adapter / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            continue
        if isinstance(values.get("loss"), (int, float)):
            steps.append(values)
        elif any(name.startswith("eval_") for name in values):
            evaluations.append(values)
    return steps, evaluations


def _stretches(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the mean loss, and the last learning rate, of equal stretches of the steps."""
    rows = []
    count = min(_STRETCHES, len(steps))
    for i in range(count):
        part = steps[i * len(steps) // count : (i + 1) * len(steps) // count]
        losses = [step["loss"] for step in part if math.isfinite(step["loss"])]
        first, last = part[0]["step"], part[-1]["step"]
        mean = f"{math.fsum(losses) / len(losses):.4f}" if losses else "not finite"
        rate = part[-1].get("learning_rate")
        rows.append((f"{first}" if first == last else f"{first} to {last}", mean, _rounded(rate)))
    return rows


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _evaluated(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of the last evaluations, a column for each score."""
    last = evaluations[-_STRETCHES:]
    names = list(dict.fromkeys(name for each in last for name in each if name.startswith("eval_")))
    rows = [[str(each["step"]), *(_rounded(each.get(name)) for name in names)] for each in last]
    return table(["step", *(name.removeprefix("eval_") for name in names)], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown; a cell holds any text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _code(language: str, lines: Iterable[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
