"""What several verbs share: types, choices and help of arguments, and arguments after options."""

import argparse
import re
import sys
from pathlib import Path
from typing import TypeAlias

import lorakit as lk

# argparse has no public name for what `add_subparsers` returns.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

MODEL_HELP = "directory, .gguf file or Hub id of the model; org/name:Q4_K_M is a GGUF file there"
ADAPTER_HELP = "directory or Hub id of an adapter, or its .gguf file"
NAMED_ADAPTER_HELP = (
    "directory or Hub id of an adapter, or its .gguf file, after a name and = (default: its own "
    "name); several --adapter may be given"
)
OUT_HELP = "directory to write; it must be new or empty"
DTYPE_HELP = "dtype of the model: bfloat16, float16 or float32 (default: bfloat16)"
TEMPLATE_HELP = (
    "chat template: a jinja file, chatml, gemma, gemma4, llama3 or zephyr (default: the model's)"
)
ADAPTED_TEMPLATE_HELP = TEMPLATE_HELP.replace("the model's", "the adapter's, or else the model's")
STORAGE = ["nf4", "fp4", "int8"]  # the ways to pack a model's frozen weights


def count(text: str) -> int:
    """Return the whole number in an argument; argparse reports any other text as wrong usage."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def chat_template(given: str | None, adapter: Path | None) -> str | Path | None:
    """Return the chat template for a model with an adapter: the one given, or else the adapter's.

    None, the model's own, if neither is there.
    """
    if given is None and adapter is not None:
        adapter = adapter.expanduser()
        return adapter if (adapter / "chat_template.jinja").is_file() else None
    return given


def tokenizer_of(model: str, adapter: str | Path | None) -> str | Path:
    """Return where the tokenizer lies: beside the adapter, if it was saved there, or the model."""
    if adapter is not None and (Path(adapter).expanduser() / "tokenizer.json").is_file():
        return adapter
    return model


def head_for(model: str, adapter: Path | None) -> "lk.ClassifierConfig | None":
    """Return the head for classes that a model is given for an adapter; None if it needs none."""
    if adapter is None or lk.read_classifier(model) is not None:
        return None
    return lk.read_classifier(adapter)


def named_adapter(text: str) -> tuple[str, str]:
    """Return the name of an adapter, and its place, which an argument [NAME=]ADAPTER holds.

    Without NAME it is called as its directory or its repository is. argparse reports an argument
    that lacks one of the two as wrong usage.
    """
    name, equals, place = text.partition("=")
    if not equals or "/" in name:  # a path may hold any letter
        place = text
        last = Path(text).expanduser().resolve().name.removesuffix(".gguf")
        name = re.sub(r"[.:]", "-", last)
    if not name or not place:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=ADAPTER")
    return name, place


def fetched_adapters(named: list[tuple[str, str]]) -> dict[str, Path]:
    """Return where named adapters lie on this machine; raise LorakitError if two have one name."""
    if len(dict(named)) < len(named):
        raise lk.LorakitError("--adapter: two adapters have one name; write NAME=ADAPTER")
    return {name: lk.fetch_adapter(place) for name, place in named}


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how tokens are picked, and where a text ends."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the fewest likely tokens with this total probability",
    )
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="leave out tokens less probable than this share of the likeliest",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="penalty on tokens that the text holds already; 1, the default, is none",
    )
    add(
        "--stop",
        action="append",
        default=[],
        help="end before this text; several --stop may be given",
    )
    add("--seed", type=int, help="seed of the drawn tokens")


# ---- arguments that stand after an option ----
#
# argparse closes a list of arguments at the first option, so `train run.yaml --debug max_steps=3`
# leaves max_steps=3 over. A verb's `take_rest` adds these arguments to those of the verb, and
# returns whether it took them all.


def take_nothing(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take no argument after an option: the verb has no list of arguments."""
    return not rest


def take_overrides(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take every argument after an option as an override; exit with 2 if one is no key=value."""
    args.overrides += rest
    for override in args.overrides:
        name, equals, _ = override.partition("=")
        if not (name and equals):
            print(f"lorakit: {override!r} is not of the form key=value", file=sys.stderr)
            sys.exit(2)
    return True


def take_runs(args: argparse.Namespace, rest: list[str]) -> bool:
    """Take every argument after an option as a run."""
    args.runs += rest
    return True
