"""Draws the curves of training runs, from the metrics.jsonl that each run has written.

PNG     one picture for each quantity over the optimizer steps, with a colour for each run: loss
        (solid in training, dashed in evaluations), learning rate, gradient norm, tokens per second
HTML    the report about these runs (report.py); it needs neither files beside it nor a network
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorakit.board.report import write_report
from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path, atomic, read_text

log = logging.getLogger("lorakit")

# file name -> label of the axis, the quantity drawn solid, and the one drawn dashed with dots
PLOTS: dict[str, tuple[str, str, str | None]] = {
    "loss": ("loss, nats per label token", "loss", "eval_loss"),
    "learning_rate": ("learning rate", "learning_rate", None),
    "grad_norm": ("gradient norm", "grad_norm", None),
    "tokens_per_second": ("tokens per second", "tokens_per_second", None),
}


def plot_runs(paths: str | Path | Iterable[str | Path], out: str | Path) -> Path:
    """Draw the curves of training runs into a directory: four PNG files and runs.html.

    It needs matplotlib (the extra `plots`). A last line that a run has not written whole is left
    out, with a warning of the logger "lorakit".

    Args:
        paths: The output directory of a run, or several.
        out: The directory of the files. It is made if it is missing.

    Returns:
        The path of runs.html, the page that `write_report` writes about these runs.

    Raises:
        LorakitError: No run is given, matplotlib is missing, a directory holds no metrics.jsonl of
            a run, or `out` cannot be a directory.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    folders = [as_path(path) for path in paths]
    runs = _named(folders)
    if not runs:
        raise LorakitError("plot_runs: name the output directory of at least one run")
    out = as_path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise LorakitError(f"plot_runs: {out} is not a directory; choose another") from None
    for name in PLOTS:
        with atomic(out / f"{name}.png") as temporary:
            _draw(name, runs, temporary)
    return write_report(folders, out / "runs.html")


# ---- reading ----

Line = Mapping[str, float]  # a line of metrics.jsonl: numbers by name, "step" among them


def _named(paths: list[Path]) -> dict[str, list[Line]]:
    """Return the lines of each run by its name.

    The name is the last part of the path, or the whole path if several runs share that part.
    """
    paths = list(dict.fromkeys(paths))
    leaves = [path.resolve().name for path in paths]
    names = [
        leaf if leaves.count(leaf) == 1 else str(path)
        for leaf, path in zip(leaves, paths, strict=True)
    ]
    shown = [name.encode("utf-8", "replace").decode() for name in names]  # a path may be any bytes
    return {name: _read_metrics(path) for name, path in zip(shown, paths, strict=True)}


def _read_metrics(directory: Path) -> list[Line]:
    """Return the lines of a run's metrics.jsonl. Raises LorakitError if it is not one."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise LorakitError(
            f"{directory} holds no metrics.jsonl; name the output_dir of a training run"
        )
    text, lines = read_text(path), []
    *whole, rest = text.split("\n")
    for number, line in enumerate(whole, 1):
        if line.strip():
            lines.append(_parsed(line, f"{path} line {number}"))
    if rest:
        log.warning("lorakit: %s: the last line is cut off and left out", path)
    if not lines:
        raise LorakitError(f"{path} holds no step yet")
    return lines


def _parsed(line: str, place: str) -> Line:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LorakitError(f"{place} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise LorakitError(f"{place}: an object with a whole number 'step' is wanted")
    for name, value in values.items():
        whole = type(value) is int and abs(value) < 2**63
        if not whole and type(value) is not float:
            raise LorakitError(f"{place}: {name} must be a number, not {value!r}")
    return values


def _curve(lines: list[Line], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of a quantity.

    A value that is infinite, or nearly so, becomes NaN, which no line goes through.
    """
    found = [(line["step"], line[name]) for line in lines if name in line]
    values = [float(v) if abs(v) < 1e300 else math.nan for _, v in found]  # matplotlib's limit
    return [step for step, _ in found], values


# ---- drawing ----


def _draw(name: str, runs: Mapping[str, list[Line]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise LorakitError("plots need matplotlib: pip install 'lorakit[plots]'") from None
    label, solid, dashed = PLOTS[name]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for i, (run, lines) in enumerate(runs.items()):
        colour = f"C{i % 10}"
        axes.plot(*_curve(lines, solid), color=colour, linewidth=1, label=_plain(run))
        if dashed is not None:
            steps, values = _curve(lines, dashed)
            if steps:
                label_of = f"{_plain(run)}, evaluation"
                axes.plot(steps, values, "--", marker=".", color=colour, label=label_of)
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _plain(name: str) -> str:
    r"""Return a name as matplotlib shows it.

    A "$" would begin a formula, and a "_" in front would hide the label.
    """
    space = " " if name.startswith("_") else ""
    return space + name.replace("$", r"\$")
