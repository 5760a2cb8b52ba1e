"""`lorakit plan`: say how much memory a run will take, what would make it less, and what fits."""

import argparse
import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import lorakit as lk
from lorakit.cli.arguments import MODEL_HELP, Verbs, count, take_overrides
from lorakit.cli.run_file import encode_as, open_rows, put_overrides, read_run_file

_WIDEST = 120  # characters of a line; a longer bar is no easier to read


def add_parser(verbs: Verbs, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command line."""
    parser = verbs.add_parser(
        "plan",
        parents=[common],
        help="say how much memory a run will take, and what fits",
        description="Forecast the memory of a run, on this machine or on another one, and say what "
        "would make it less. No weight is read and no GPU is needed. key=value replaces a value of "
        "the run file. The exit code is 1 if the run does not fit.",
    )
    add = parser.add_argument
    add(
        "what",
        metavar="run.yaml|MODEL",
        help=f"YAML file of the run; or a {MODEL_HELP}, for a run with the default settings",
    )
    add("overrides", nargs="*", metavar="key=value", help="value to use instead of the file's")
    add(
        "--device",
        metavar="NAME",
        help='GPU to plan for, such as "RTX 4090", or cpu (default: the device of this machine)',
    )
    add(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="memory of the device, such as 24GB (10^9 bytes each) or 24GiB (2^30)",
    )
    add("--ranks", type=count, default=1, metavar="N", help="devices that train together")
    add(
        "--largest",
        choices=["batch", "length", "rank"],
        help="search for the most rows at a time, the longest row or the highest rank that fits",
    )
    add("--fit", action="store_true", help="search for the cheapest settings that fit")
    add(
        "--generate",
        type=_three,
        metavar="ROWS,PROMPT,NEW",
        help="plan for texts, not for training: so many at a time, tokens of a prompt, new tokens",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=plan, take_rest=take_overrides)


def plan(args: argparse.Namespace) -> int:
    """Print the forecast and what was asked for beside it, and return the exit code."""
    if args.generate is not None and (args.largest or args.fit):
        raise lk.LorakitError(
            "--largest and --fit search the settings of a training: leave out --generate"
        )
    if args.ranks == 0:
        raise lk.LorakitError("--ranks is 0; a run has at least 1 device")
    kind, card = _device(args.device, args.memory, args.ranks)
    asked, notes = _planned(args, kind, card)
    run = lk.settled_run(asked, card.usable)
    forecast = run.forecast()
    fits = forecast.reserved <= card.usable
    answer = _Answer(run, asked.train.mlp_activations, card, args)
    if args.json:
        told = {"fits": fits, "device": dataclasses.asdict(card), "usable": card.usable}
        told |= {"plan": dataclasses.asdict(forecast), "notes": notes, **answer.values()}
        print(json.dumps(told))
        return 0 if fits else 1
    for note in notes:
        print(note)
    print(f"{_summary(run)}, on {card.name}\n")
    width = min(_WIDEST, shutil.get_terminal_size((100, 24)).columns)
    print(lk.plan_table(forecast, card, width=width))
    print(_verdict(run, forecast, card), flush=True)
    print("\n".join(answer.lines()))
    return 0 if fits else 1


# ---- what is planned ----


def _size(text: str) -> int:
    try:
        return lk.memory.parse_bytes(text)
    except lk.LorakitError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _three(text: str) -> tuple[int, int, int]:
    try:
        rows, prompt, new = (count(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form ROWS,PROMPT,NEW, such as 8,512,128"
        ) from None
    return rows, prompt, new


def _device(name: str | None, memory: int | None, ranks: int) -> tuple[str, "lk.Card"]:
    """Return "cuda" or "cpu", and the device that the arguments name, or that of this machine."""
    import torch

    if name is None and memory is not None:
        card = lk.Card(f"a GPU of {lk.memory.format_bytes(memory)}", memory, (9, 0))
        return "cuda", card
    if name is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        capability = (found.major, found.minor)
        return "cuda", lk.Card(found.name, found.total_memory, capability)
    if name is None or name.lower() == "cpu":
        # the processes of a machine share its memory
        left = lk.memory.free_memory("cpu") // ranks if memory is None else memory
        return "cpu", lk.Card("the CPU", left, (0, 0), context=0)
    card = lk.find_card(name)
    return "cuda", card if memory is None else dataclasses.replace(card, memory=memory)


def _planned(
    args: argparse.Namespace, kind: str, card: "lk.Card"
) -> tuple["lk.PlannedRun", list[str]]:
    """Return the run that the arguments describe, and what should be said of it."""
    notes = list[str]()
    if _is_run_file(args.what):
        values = read_run_file(Path(args.what), args.overrides)
    else:
        values = {"model": args.what, "data": "-"}
        put_overrides(values, args.overrides, "the settings of the run")
    config = lk.RunConfig.from_dict(values, args.what)
    lengths, tok = None, None
    if config.data.train != "-" and args.generate is None:
        lengths, tok, notes = _lengths(config)
    device: dict[str, Any] = {"device": kind, "ranks": args.ranks, "generate": args.generate}
    if kind == "cuda":
        device["capability"] = card.capability
    run = lk.PlannedRun.from_run(config, lengths, tok, **device)
    plain = config.adapter is None and config.lora == lk.LoraConfig()
    if args.generate is not None and plain and not _is_run_file(args.what):
        run = dataclasses.replace(run, lora=None)
    return run, notes


def _is_run_file(what: str) -> bool:
    """Return whether the first argument names a run file, and not a model."""
    return what.endswith((".yaml", ".yml"))


def _lengths(config: "lk.RunConfig") -> tuple[Any, Any, list[str]]:
    """Return the number of tokens of each row of the run's file, if it is there, or say why not.

    The tokenizer comes with them, if it could be loaded.
    """
    whole = f"rows of {config.train.max_seq_length} tokens are planned for"
    train = config.data.train
    gone = isinstance(train, str) and not Path(train).expanduser().exists()
    if isinstance(train, str) and gone and (Path(train).suffix or "/" not in train):  # no data set
        return None, None, [f"{train} is not there: {whole}"]
    adapter = None if config.adapter is None else lk.fetch_adapter(config.adapter)
    try:
        tok, rows = open_rows(config, adapter)
    except lk.LorakitError as error:
        return None, None, [f"the rows cannot be counted ({error}): {whole}"]
    return encode_as(config.train, rows["train"], tok).lengths, tok, []


# ---- what is said ----


def _summary(run: "lk.PlannedRun") -> str:
    """Return the run in a few words."""
    storage = run.dtype if run.quantize is None else run.quantize.quant_type
    parts = [f"{run.model}", f"weights in {storage}"]
    if run.shard == "full":
        parts.append(f"divided among {run.ranks} devices")
    elif run.ranks > 1:
        parts.append(f"whole on each of {run.ranks} devices")
    if run.offload_weights:
        parts.append("waiting in host memory")
    if isinstance(run.lora, lk.LoraConfig):
        parts.append(f"LoRA of rank {run.lora.r}")
    elif run.lora is not None:
        parts.append(f"an adapter of {type(run.lora).__name__}")
    elif run.generate is None:
        parts.append("all trained")
    if run.generate is not None:
        rows, prompt, new = run.generate
        return ", ".join([*parts, f"{rows} texts of {prompt} + {new} tokens"])
    documents = run.documents()
    if documents is None:
        grpo = run.train.grpo
        completion = "" if grpo is None else f" + {grpo.max_completion_length}"
        parts.append(f"{run.rows} x {run.tokens()}{completion} tokens at a time")
    else:
        parts.append(f"{sum(documents)} packed tokens at a time")
    return ", ".join(parts)


def _verdict(run: "lk.PlannedRun", forecast: "lk.MemoryPlan", card: "lk.Card") -> str:
    """Return the peak of each phase, whether the run fits, and what else it takes."""
    size = lk.memory.format_bytes
    phases = ", ".join(f"{name} {size(peak)}" for name, peak in forecast.phases.items() if peak)
    lines = [f"the peak is in {forecast.when} ({phases})"]
    if forecast.activations:
        parts = sorted(forecast.activations.items(), key=lambda part: -part[1])
        kept = ", ".join(f"{name} {size(bytes_)}" for name, bytes_ in parts if bytes_)
        lines.append(f"activations at the peak: {kept}")
    if forecast.host >= 1000:
        lines.append(f"host memory: {size(forecast.host)}")
    if run.device == "cpu":
        lines.append("a process on a CPU takes 1.6 to 2.5 times what torch does, and its libraries")
    over = forecast.reserved - card.usable
    if over > 0:
        lines.append(f"it does not fit {card.name}: {size(over)} too much")
    else:
        lines.append(f"it fits {card.name}: {size(-over)} are left")
    return "\n".join(lines)


class _Answer(NamedTuple):
    """What was asked for beside the forecast: a search, or else what would help."""

    run: "lk.PlannedRun"
    mlp_activations: str  # as the run has it, which may be "auto"
    card: "lk.Card"
    args: argparse.Namespace

    def values(self) -> dict[str, Any]:
        """Return the answer for JSON."""
        usable, told = self.card.usable, dict[str, Any]()
        if self.args.largest:
            # a run that is larger may have other blocks that keep gate and up
            run = self.run.with_train(mlp_activations=self.mlp_activations)
            found = lk.largest_that_fits(run, self.args.largest, usable)
            told["largest"] = {self.args.largest: found}
        if self.args.fit:
            saving = lk.settings_that_fit(self.run, usable)
            needs = saving.run.forecast().reserved
            told["fit"] = {"settings": saving.settings, "reserved": needs, "fits": needs <= usable}
        if not told and self.args.generate is None:
            told["savings"] = [
                {"settings": each.settings, "reserved": each.run.forecast().reserved}
                for each in lk.forecast_savings(self.run)
            ]
        return told

    def lines(self) -> list[str]:
        """Return the answer as lines."""
        told, size, lines = self.values(), lk.memory.format_bytes, list[str]()
        now = size(self.run.forecast().reserved)
        if "largest" in told:
            [(what, found)] = told["largest"].items()
            name = {"batch": "rows at a time", "length": "tokens of a row", "rank": "rank"}[what]
            lines.append(f"largest {name}: {found or 'not even the smallest fits'}")
        if "fit" in told:
            lines += self._fit(told["fit"])
        if told.get("savings"):
            lines.append("\nwhat would help, each by itself:")
        for saving in told.get("savings", []):
            words = " ".join(f"{name}={value}" for name, value in saving["settings"].items())
            lines.append(f"  {words}: {now} -> {size(saving['reserved'])}")
        return lines

    def _fit(self, found: dict[str, Any]) -> list[str]:
        """Return what to say of the cheapest settings that fit."""
        size = lk.memory.format_bytes
        words = [f"{name}={value}" for name, value in found["settings"].items()]
        if not found["fits"]:
            least = f"{size(found['reserved'])} with {' '.join(words)}" if words else "as it is"
            return [f"nothing makes it fit {size(self.card.usable)}; the least is {least}"]
        if not words:
            return ["it fits as it is"]
        if _is_run_file(self.args.what):
            words = ["lorakit", "train", self.args.what, *self.args.overrides, *words]
        command = shlex.join(words)
        return [f"cheapest settings that fit, with {size(found['reserved'])}:", f"  {command}"]
