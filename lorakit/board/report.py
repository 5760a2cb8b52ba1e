"""Writes the page about runs as one file, which anybody can open and send on."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.board import comparisons
from lorakit.board import runs as read
from lorakit.board.folder import COMPARISON, Folder
from lorakit.board.metrics import Cache
from lorakit.board.single import single_page
from lorakit.config.errors import LorakitError
from lorakit.files.local import as_path, read_json, write_text

POINTS, ALL_POINTS, LEAST_POINTS = 1000, 20_000, 100
"""Most points of a curve, of a quantity in all runs together, and what each run has in any case."""
DIGITS = 6  # of a value; a screen shows fewer
LEFT_OUT = {"epoch", "padding"}  # quantities that the page does not draw


def write_report(runs: str | Path | Iterable[str | Path], out: str | Path) -> Path:
    """Write a page about runs as one HTML file.

    It is the page of the board, without what takes a server: curves, settings, evaluations, samples
    and comparisons, as they are now. It opens in a browser without a network. Curves have at most
    1,000 points, fewer if there are many runs; every lowest and highest value is kept.

    Args:
        runs: The output directory of a run, a folder that holds runs and comparisons at any depth,
            or several of both.
        out: The file to write. Its folder is made if it is missing.

    Returns:
        The path of the file.

    Raises:
        LorakitError: A folder is missing, or holds no run and no comparison; a comparison is
            damaged, or `out` cannot be a file.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise LorakitError("write_report: name the output directory of at least one run")
    found, compared = dict[str, Path](), dict[str, Path]()
    roots = list(dict.fromkeys(as_path(path) for path in paths))
    for root in roots:
        _look(root, found, compared, alone=len(roots) == 1)
    answers = _answers(found) | _of_comparisons(compared)
    name = roots[0].resolve().name if len(roots) == 1 else f"{len(found)} runs"
    target = as_path(out)
    if target.is_dir():
        raise LorakitError(f"write_report: {target} is a directory; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise LorakitError(f"write_report: {target.parent} is not a directory") from None
    home = "comparisons" if str(roots[0]) in compared else "runs"
    write_text(target, single_page(answers, name, home))
    return target


def _look(root: Path, runs: dict[str, Path], compared: dict[str, Path], alone: bool) -> None:
    """Add the runs and the comparisons in a folder, by ids that no other has.

    A run that is named itself is called by its folder's name.
    """
    folder = Folder(root)
    there, found = folder.runs(), folder.comparisons()
    if not there and not found:
        raise LorakitError(f"{root} holds no run: neither metrics.jsonl nor run.json is in it")
    prefix = "" if alone else f"{root}/"
    for kept, new in ((runs, there), (compared, found)):
        kept.update({str(root) if id_ == "/" else f"{prefix}{id_}": new[id_] for id_ in new})


def _answers(found: dict[str, Path]) -> dict[str, Any]:
    """Return what the server would say of runs, by its paths."""
    cache = Cache()
    points = max(LEAST_POINTS, min(POINTS, ALL_POINTS // max(1, len(found))))
    names = Counter(path.name for path in found.values())
    listed, answers = list[dict[str, Any]](), dict[str, Any]()
    for id_, path in found.items():
        shown = path.name if names[path.name] == 1 else id_
        listed.append({**read.summary(path, id_), "name": shown, "can_resume": False})
        curves, evaluations = _curves(cache, path, points)
        answers |= {
            f"api/runs/{id_}/metrics": curves,
            f"api/runs/{id_}/evaluations": evaluations,
            f"api/runs/{id_}/settings": read.settings(path),
            f"api/runs/{id_}/samples": read.samples(path),
            f"api/runs/{id_}/memory": read.memory(curves),
        }
    return {"api/runs": listed, **answers}


def _curves(cache: Cache, path: Path, points: int) -> tuple[dict[str, Any], list[Any]]:
    """Return the curves and the evaluations of a run, none if it has no step yet."""
    metrics = cache.of(path)
    curves = {
        name: {"step": curve["step"], "value": [_short(value) for value in curve["value"]]}
        for name, curve in metrics.curves(points).items()
        if name not in LEFT_OUT
    }
    return curves, metrics.evaluations()


def _short(value: float | None) -> float | None:
    """Return a value with as many digits as are shown, for a file of half the size."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _of_comparisons(found: dict[str, Path]) -> dict[str, Any]:
    """Return what the server would say of comparisons, by its paths."""
    values = {id_: read_json(path / COMPARISON) for id_, path in found.items()}
    return {"api/comparisons": comparisons.summaries(found)} | {
        f"api/comparisons/{id_}": value for id_, value in values.items()
    }
