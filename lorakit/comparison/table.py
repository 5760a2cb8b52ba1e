"""The tables of a comparison: for a terminal, and as Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorakit.comparison.rows import PARTS
from lorakit.config.comparison import UNTRAINED

_NUMBERS = ("train tok/s", "seconds", "peak MB")


def as_text(values: Mapping[str, Any]) -> str:
    """Return a comparison as lines for a terminal.

    Args:
        values: The values of comparison.json.

    Returns:
        A table for each task, the recommendation with its rules, and what failed.
    """
    return "\n".join(_parts(values, _plain_table, lambda title: title, str))


def as_markdown(values: Mapping[str, Any]) -> str:
    """Return a comparison as a page of Markdown.

    Args:
        values: The values of comparison.json.

    Returns:
        A table for each task, the recommendation with its rules, and what failed.
    """
    parts = _parts(values, _markdown_table, lambda title: f"## {_safe(title)}", _safe)
    return "\n".join([f"# {_safe(values['name'])}", "", *parts]) + "\n"


def _parts(
    values: Mapping[str, Any],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]],
    heading: Callable[[str], str],
    text: Callable[[str], str],
) -> list[str]:
    parts = []
    for task in values["tasks"]:
        sizes = ", ".join(f"{task['sizes'][p]} {p}" for p in PARTS if p in task["sizes"])
        parts += [heading(f"{task['name']} ({task['kind']}; rows: {sizes})"), ""]
        if not task["rows"]:
            parts += ["No run of this task is finished.", ""]
            continue
        parts += [*table(*_cells(task)), ""]
        parts += [text(line) for line in _differences(task)] + [""]
    parts += _exports(values, table, heading)
    found = values["recommendation"]
    parts += [heading("Recommendation"), "", text(found["text"]), ""]
    for number, rule in enumerate(found["rules"], 1):
        parts.append(text(f"{number}. {rule['rule']} {rule['says']}"))
    bad = [run for run in values["runs"] if run["state"] == "failed"]
    said = [f"{run['id']} failed: {run['error']}" for run in bad] + list(values["notes"])
    parts += ["", *(f"- {text(line)}" for line in said)] if said else []
    return parts


def _cells(task: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of a task's table."""
    head = ["model", "settings", *task["metrics"], *_NUMBERS]
    rows = []
    for row in task["rows"]:
        seeds = len(row["run ids"])
        name = row["settings"] + (f" ({seeds} seeds)" if seeds > 1 else "")
        scores = [_interval(row["scores"][metric]) for metric in task["metrics"]]
        numbers = [row["tokens_per_second"], row["seconds"], row["peak_memory_mb"]]
        rows.append(
            [row["model"], name, *scores, *("" if n is None else f"{n:,.0f}" for n in numbers)]
        )
    return head, rows


def _differences(task: Mapping[str, Any]) -> list[str]:
    """Return a line for each pair with the best score, or of a model before and after training.

    The metric is the one that decides. comparison.json has all pairs in all metrics.
    """
    lines, metric = [], task["metrics"][0]
    best = _best_of(task, metric)
    for pair in task["pairs"]:
        sides = [pair["first"], pair["second"]]
        same_model = sides[0]["model"] == sides[1]["model"]
        untrained = same_model and UNTRAINED in (side["settings"] for side in sides)
        if pair["metric"] != metric or not (untrained or best in sides):
            continue
        one, two = (
            f"{pair[side]['model']} {pair[side]['settings']}" for side in ("first", "second")
        )
        verdict = "within noise" if pair["within_noise"] else "they differ"
        found = _interval(pair["difference"], "+.3f")
        p_value = pair["p_value"]
        lines.append(f"{two} - {one}: {found}, p = {p_value:.2g}: {verdict}")
    return lines


def _best_of(task: Mapping[str, Any], metric: str) -> dict[str, Any] | None:
    """Return the model and the settings with the best score; None if no score is finite."""
    scored = [row for row in task["rows"] if row["scores"][metric]["value"] is not None]
    if not scored:
        return None
    sign = 1 if scored[0]["scores"][metric]["better"] == "higher" else -1
    row = max(scored, key=lambda row: sign * row["scores"][metric]["value"])
    return {"model": row["model"], "settings": row["settings"]}


def _exports(
    values: Mapping[str, Any],
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]],
    heading: Callable[[str], str],
) -> list[str]:
    """Return the table of the exported models, if there are any."""
    found = {row["model"]: row["export"] for task in values["tasks"] for row in task["rows"]}
    rows = []
    for model, exports in found.items():
        for name, said in sorted(exports.items()):
            if "error" in said:
                rows.append([model, name, said["error"], "", ""])
                continue
            speed = said["tokens_per_second"]
            shown = "" if speed is None else f"{speed:,.1f}"
            threads = said["threads"]
            by = f"{said['measured_by']}, {threads} thread{'s' * (threads != 1)}"
            rows.append([model, name, f"{said['bytes'] / 1e6:,.1f}", shown, by])
    if not rows:
        return []
    head = ["model", "GGUF", "MB", "decoded tok/s", "measured by"]
    return [heading("Exported models"), "", *table(head, rows), ""]


def _interval(score: Mapping[str, Any], form: str = ".3f") -> str:
    value, low, high = (score[name] for name in ("value", "low", "high"))
    if value is None:
        return "not finite"
    if low is None or high is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _plain_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in [head, *rows]:
        lines.append("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    return lines


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[_safe(cell) for cell in row] for row in [head, *rows]]
    lines.insert(1, ["---"] * len(head))
    return [f"| {' | '.join(line)} |" for line in lines]


def _safe(text: str) -> str:
    """Return a text that Markdown shows as it is, so that a name brings no markup along."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return text
