"""The recommendation: five rules that a reader can check, each with what it says of the numbers.

No rule weighs one metric against another or holds a hidden constant. They look at the table and at
the pairs of comparison.json alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.config.comparison import UNTRAINED

Cell = tuple[str, str]  # the names of a model and of its settings


def recommend(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recommendation that comparison.json holds.

    Args:
        values: The other values of comparison.json.

    Returns:
        "text", a sentence; "model" and "settings", None where nothing can be said; and "rules",
        each with what it "says" here.
    """
    tasks = values["tasks"]
    trained = [_trained(task) for task in tasks]
    cells = [cell for cell in trained[0] if all(cell in of_task for of_task in trained)]
    if not cells:
        text = "There is nothing to recommend: no model is trained on every task yet."
        return {"text": text, "model": None, "settings": None, "rules": []}
    good = {task["name"]: _within_noise_of_best(task, cells) for task in tasks}
    counts = {cell: sum(cell in each for each in good.values()) for cell in cells}
    most = max(counts.values())
    first = [cell for cell in cells if counts[cell] == most]
    chosen = min(first, key=lambda cell: _cost(tasks, cell))
    rules = [
        _rule_of_metrics(tasks),
        _rule_of_rows(tasks, cells),
        _rule_of_noise(tasks, good),
        _rule_of_cost(tasks, first, chosen),
    ]
    where = f"best, or within noise of the best, in {most} of {_count(len(tasks), 'task')}"
    text = f"Take {_name(chosen)}: {where}"
    text += f", and the cheapest of {len(first)} such." if len(first) > 1 else "."
    if len(cells) == 1:
        text = f"{_name(chosen)} is the only one that is trained on every task."
    if verdicts := _against_the_untrained(tasks, chosen):
        says = "; ".join(f"{name}: {verdict}" for name, (verdict, _) in verdicts.items())
        rules.append({"rule": "Training must pay.", "says": f"{says}."})
        if not any(pays for _, pays in verdicts.values()):
            text += " But on no task is it shown to be better than the untrained model."
    return {
        "text": text,
        "model": chosen[0],
        "settings": chosen[1],
        "rules": rules,
    }


# ---- the rules ----


def _rule_of_metrics(tasks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    said = "; ".join(f"{task['name']} by {_decides(task)}" for task in tasks)
    return {"rule": "The first metric of a task decides it.", "says": f"{said}."}


def _rule_of_rows(tasks: Sequence[Mapping[str, Any]], cells: Sequence[Cell]) -> dict[str, str]:
    said = []
    for task in tasks:
        scores = [_score(task, cell) for cell in cells]
        widths = [
            (score["high"] - score["low"]) / 2 for score in scores if score["low"] is not None
        ]
        width = f"±{max(widths):.3f}" if widths else "of no known width"
        what = f"{task['name']}: {_count(task['sizes']['test'], 'test row')}, intervals {width}"
        pairs = _pairs(task, cells)
        if pairs and all(pair["within_noise"] for pair in pairs):
            what += ", too few rows to tell any two apart"
        said.append(what)
    rule = "Scores whose intervals are wide tell little; more test rows make them narrower."
    return {"rule": rule, "says": "; ".join(said) + "."}


def _rule_of_noise(
    tasks: Sequence[Mapping[str, Any]], good: Mapping[str, Sequence[Cell]]
) -> dict[str, str]:
    said = []
    for task in tasks:
        best, *others = good[task["name"]]
        score = _score(task, best)["value"]
        line = (
            f"{task['name']}: {_name(best)} has {'no score' if score is None else f'{score:.3f}'}"
        )
        line += f", within noise of it {', '.join(map(_name, others))}" if others else ", alone"
        said.append(line)
    tested = sum(len(_pairs(task, None)) for task in tasks)
    rule = (
        "The best score counts, and so does what is within noise of it: p above 0.05, or an "
        f"interval of the difference that holds 0. Of {_count(tested, 'pair')}, about "
        f"{tested * 0.05:.1f} would differ by chance alone."
    )
    return {"rule": rule, "says": "; ".join(said) + "."}


def _rule_of_cost(
    tasks: Sequence[Mapping[str, Any]], first: Sequence[Cell], chosen: Cell
) -> dict[str, str]:
    rule = (
        "Of those that are among the best in most tasks, the smallest model counts, then the "
        "fewest trained parameters, then the shortest training."
    )
    said = []
    for cell in first:
        size, parameters, seconds = _cost(tasks, cell)
        said.append(f"{_name(cell)}: {size:,.0f} MB, {parameters:,} trained, {seconds:,.0f} s")
    chosen_says = f"; so {_name(chosen)}" if len(first) > 1 else ""
    return {"rule": rule, "says": "; ".join(said) + f"{chosen_says}."}


def _against_the_untrained(
    tasks: Sequence[Mapping[str, Any]], chosen: Cell
) -> dict[str, tuple[str, bool]]:
    """Return what training did for each task that was measured before: words, and if it paid."""
    said, before = {}, (chosen[0], UNTRAINED)
    for task in tasks:
        found = [
            pair
            for pair in _pairs(task, None)
            if {_cell(pair["first"]), _cell(pair["second"])} == {before, chosen}
        ]
        if not found:
            continue
        [pair] = found
        forward = _cell(pair["second"]) == chosen
        gain = pair["difference"]["value"]
        gain = None if gain is None else gain if forward else -gain
        if gain is None or pair["within_noise"]:
            verdict, pays = "no better than the untrained model, as far as the rows can tell", False
        else:
            pays = (gain > 0) == (_score(task, chosen)["better"] == "higher")
            verdict = f"{gain:+.3f} {_decides(task)}, {'better' if pays else 'WORSE'}"
        said[str(task["name"])] = verdict, pays
    return said


# ---- what the rules look at ----


def _within_noise_of_best(task: Mapping[str, Any], cells: Sequence[Cell]) -> list[Cell]:
    """Return the cell with the best score, then those within noise of it."""

    def worth(cell: Cell) -> float:
        score = _score(task, cell)
        if score["value"] is None:
            return float("-inf")
        return float(score["value"] if score["better"] == "higher" else -score["value"])

    best = max(cells, key=worth)
    near = [
        other
        for pair in _pairs(task, cells)
        for other in {_cell(pair["first"]), _cell(pair["second"])} - {best}
        if best in (_cell(pair["first"]), _cell(pair["second"]))
        and pair["within_noise"]
        and worth(other) > float("-inf")
    ]
    return [best, *near]


def _pairs(task: Mapping[str, Any], cells: Sequence[Cell] | None) -> list[Mapping[str, Any]]:
    """Return the pairs of a task in the metric that decides, of some cells or of all."""
    return [
        pair
        for pair in task["pairs"]
        if pair["metric"] == _decides(task)
        and (cells is None or {_cell(pair["first"]), _cell(pair["second"])} <= set(cells))
    ]


def _trained(task: Mapping[str, Any]) -> list[Cell]:
    return [_cell(row) for row in task["rows"] if row["settings"] != UNTRAINED]


def _row(task: Mapping[str, Any], cell: Cell) -> Mapping[str, Any]:
    return next(row for row in task["rows"] if _cell(row) == cell)


def _score(task: Mapping[str, Any], cell: Cell) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _row(task, cell)["scores"][_decides(task)]
    return found


def _cost(tasks: Sequence[Mapping[str, Any]], cell: Cell) -> tuple[float, int, float]:
    """Return megabytes of the model, trained parameters, and mean seconds of training."""
    rows = [_row(task, cell) for task in tasks]
    size = max(float(row["weights_mb"]) for row in rows)
    parameters = max(int(row["trained_parameters"]) for row in rows)
    return size, parameters, sum(float(row["seconds"] or 0) for row in rows) / len(rows)


def _cell(of: Mapping[str, Any]) -> Cell:
    return of["model"], of["settings"]


def _decides(task: Mapping[str, Any]) -> str:
    return str(task["metrics"][0])


def _name(cell: Cell) -> str:
    return f"{cell[0]} with {cell[1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
