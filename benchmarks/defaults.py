"""Which rank, alpha and learning rate? What lorakit's defaults were chosen by.

    python benchmarks/defaults.py MODEL [--first 12]          every setting once, by the loss
    python benchmarks/defaults.py MODEL --again NAME NAME     a few, with more seeds and answers

The text is this Python's own standard library, and the tasks are made of its functions:

    package      classification   the first line of a docstring -> the package that it comes from
    signature    extraction       a "def" line -> the function's name and its arguments
    describe     writing          a "def" line -> the first line of the function's docstring

Each task is cut into rows to learn, rows to choose by and rows to test with. The first command
trains QLoRA with every setting for as many steps on the same rows in the same order, and prints the
loss of the rows to choose by, in nats per label token. The second prints the scores of answers to
the test rows, which chose nothing, over several seeds. Both are comparisons as `lorakit compare`
makes them: Ctrl-C ends one after the current step, and the same command goes on.

B is zero before the first step, and AdamW moves each of its values by about the learning rate. So
after a few steps the update s B A x of rank r, with s = alpha / r, is r parts of the size of
s * rate: alpha * rate, whatever the rank. The settings are listed by that product, "strength";
with rsLoRA, s = alpha / sqrt(r), it is alpha * sqrt(r) * rate.
"""

import argparse
import json
import math
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lorakit as lk

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from compare_demo import KINDS, PACKAGES, balanced, functions, summary

LONGEST = 90  # characters of a row


class Setting(NamedTuple):
    """What one run has."""

    r: int
    alpha: int
    rate: float
    rslora: bool = False

    @property
    def name(self) -> str:
        return f"r{self.r}-a{self.alpha}-{self.rate:.0e}".replace("e-0", "e-") + "-rs" * self.rslora

    @property
    def strength(self) -> float:
        return self.alpha * self.rate * (math.sqrt(self.r) if self.rslora else 1)

    def keys(self) -> dict[str, Any]:
        """Return the keys of a run file."""
        lora = {"r": self.r, "lora_alpha": self.alpha, "use_rslora": self.rslora}
        return {"learning_rate": self.rate, "lora": lora}


# one thing at a time, what tells most first
SETTINGS = [
    Setting(8, 8, 2e-4),
    Setting(16, 32, 2e-4),
    Setting(8, 32, 2e-4),
    Setting(16, 32, 1e-3),
    Setting(16, 32, 5e-4),
    Setting(8, 8, 1e-3),
    Setting(16, 32, 2e-4, rslora=True),
    Setting(16, 32, 2e-3),
    Setting(8, 16, 2e-4),
    Setting(64, 32, 2e-4),
    *(Setting(8, 8, rate) for rate in (1e-4, 5e-4, 2e-3)),
    *(Setting(8, 16, rate) for rate in (1e-4, 5e-4, 1e-3, 2e-3)),
    *(Setting(r, r, 2e-4) for r in (4, 16, 32, 64)),
    *(Setting(r, 2 * r, 2e-4) for r in (4, 32, 64)),
    *(Setting(r, 16, 2e-4) for r in (4, 64)),
    *(Setting(r, 16, 2e-4, rslora=True) for r in (8, 64)),
]


def task_rows() -> dict[str, list[dict[str, str]]]:
    """Return the rows of each task, none of them twice, in an order that a seed draws."""
    rows: dict[str, dict[str, str]] = {name: {} for name in KINDS}
    for path, lines, node in functions(Path(sysconfig.get_paths()["stdlib"])):
        said, line = summary(node), lines[node.lineno - 1].strip()
        names = [argument.arg for argument in node.args.args]
        if said and path.parts[0] in PACKAGES:
            rows["package"].setdefault(f"Text: {said}\nPackage:", path.parts[0])
        if line.startswith("def ") and line.endswith(":"):
            if 2 <= len(names) <= 5:
                parts = [f"name: {node.name}", *(f"argument: {name}" for name in names)]
                rows["signature"].setdefault(f"{line}\nParts:", "; ".join(parts))
            if said:
                rows["describe"].setdefault(f"{line}\nIn one line:", said)
    found = {}
    for name, of_task in rows.items():
        pairs = [{"prompt": p, "completion": f" {c}"} for p, c in of_task.items()]
        pairs = [pair for pair in pairs if sum(map(len, pair.values())) <= LONGEST]
        random.Random(0).shuffle(pairs)
        found[name] = balanced(pairs) if name == "package" else pairs
    return found


def write_rows(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Write the parts of every task, and return their files by task and part."""
    files: dict[str, dict[str, str]] = {}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in task_rows().items():
        ends, start = {"choose": args.choose, "test": args.test, "train": args.train}, 0
        files[name] = {}
        for part, count in ends.items():
            chosen, start = rows[start : start + count], start + count
            if len(chosen) < count:
                sys.exit(f"defaults: {name} has {len(rows)} rows, which are too few")
            path = args.output_dir / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
            files[name][part] = str(path)
    return files


def comparison(args: argparse.Namespace, settings: list[Setting], again: bool) -> dict[str, Any]:
    """Return the mapping of a comparison file."""
    files = write_rows(args)
    tasks = {
        name: {
            "train": of_task["train"],
            "test": of_task["test" if again else "choose"],
            "kind": KINDS[name] if again else "text",  # of text the loss alone is measured
        }
        for name, of_task in files.items()
    }
    return {
        "output_dir": str(args.output_dir / ("again" if again else "once")),
        "models": {"model": args.model},
        "tasks": tasks,
        "base": {
            "dtype": "float32",  # most CPUs multiply bf16 several times slower
            "quantize": "nf4",
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch_size,
        },
        "settings": {setting.name: setting.keys() for setting in settings},
        "seeds": args.seeds if again else [0],
    }


def table(values: dict[str, Any], settings: list[Setting], first: str) -> str:
    """Return the losses of all settings that are finished, and other scores, by strength.

    A star marks what differs from `first` by more than noise, as `lorakit compare` means it.
    """
    metrics = {task["name"]: _shown(task) for task in values["tasks"]}
    head = [f"{name} {metric}" for name, of_task in metrics.items() for metric in of_task]
    lines = [["setting", "strength", *(name.replace("perplexity", "loss") for name in head)]]
    names = {setting.name: setting.strength for setting in settings}
    ordered = sorted(names, key=lambda name: names[name])
    for name in ["untrained", *ordered]:
        cells = []
        for task in values["tasks"]:
            row = next((row for row in task["rows"] if row["settings"] == name), None)
            for metric in metrics[task["name"]]:
                cells.append("" if row is None else _cell(row["scores"][metric], metric))
                cells[-1] += "*" if _differs(task, first, name, metric) else ""
        if any(cells):
            lines.append([name, f"{names[name]:.4f}" if name in names else "", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _shown(task: dict[str, Any]) -> list[str]:
    """Return the metrics of a task to print: the one that decides, and the loss."""
    decides = task["metrics"][0]
    return ["perplexity"] if decides == "bits_per_byte" else ["perplexity", decides]


def _cell(score: dict[str, Any], metric: str) -> str:
    """Return a score with its interval; a loss is the log of a perplexity."""
    ends = [score[name] for name in ("value", "low", "high")]
    if None in ends:
        return "not finite"
    value, low, high = map(math.log, ends) if metric == "perplexity" else ends
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _differs(task: dict[str, Any], first: str, name: str, metric: str) -> bool:
    return any(
        not pair["within_noise"]
        for pair in task["pairs"]
        if pair["metric"] == metric
        and {pair["first"]["settings"], pair["second"]["settings"]} == {first, name}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a Hugging Face directory, a .gguf file or a Hub id")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--choose", type=int, default=40, help="rows of a task to choose by")
    parser.add_argument("--test", type=int, default=60, help="rows of a task to test with")
    parser.add_argument("--first", type=int, default=len(SETTINGS), help="so many settings only")
    parser.add_argument("--again", nargs="+", metavar="NAME", help="these settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --again")
    args = parser.parse_args()
    args.train = args.steps * args.batch_size
    torch.set_num_threads(1)
    settings = SETTINGS[: args.first]
    if args.again:
        known = {setting.name: setting for setting in SETTINGS}
        unknown = [name for name in args.again if name not in known]
        if unknown:
            parser.error(f"no setting is called {unknown[0]}; there are {', '.join(known)}")
        settings = [known[name] for name in args.again]
    values = comparison(args, settings, again=bool(args.again))
    # by setting and not by task, so that one that was stopped has whole rows in its table
    for part in ("untrained", *(setting.name for setting in settings)):
        end = "" if part == "untrained" else "--"
        result = lk.compare_models(values, only=f"--{part}{end}")
        if result.interrupted:
            sys.exit(130)
        print(table(result.values, settings, settings[0].name), flush=True)
    sys.exit(1 if result.failed else 0)


if __name__ == "__main__":
    try:
        main()
    except lk.LorakitError as error:
        sys.exit(f"defaults: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
