"""The rows that gpu.py measures, on disk as soon as they are there, and the report made of them.

`gpu.jsonl` has a line for each row, and one at the start of each part that says on what it was
measured:

    {"part": "steps", "heading": "2026-11-22: NVIDIA H100 80GB HBM3, ..."}
    {"part": "steps", "provider": "lorakit triton", "tokens": 2048, "ms": 51.1, ...}

A row is appended and the file closed, so that a run that is cut off keeps what it has. A part that
is measured again replaces its old rows. What is not known is left out of a line. gpu.md and gpu.png
are made of this file alone.
"""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from cases import RANK, WAYS

from kernels import Row, draw_bars

# The parts of gpu.py in their order, the most important first -> the title of their section.
PARTS = {
    "steps": "A QLoRA step",
    "packed": "A QLoRA step of ragged rows",
    "peers": "The steps of peers that change transformers",
    "ops": "Ops",
    "products": "Products of M rows with a packed matrix",
}
STEPS = ("steps", "packed", "peers")
NOT_INSTALLED = "not installed"  # the error of a peer that is no failure
# what arithmetic bounds, where a share of the bandwidth says nothing
ARITHMETIC = ("attention", "frozen_linear", "linear_cross_entropy", "lora_linear", "lora_mlp")


@dataclass(frozen=True)
class StepRow:
    """A step of one provider; NaN is not known."""

    provider: str
    tokens: int
    rows: str = "dense"
    layers: str = ""  # how many, and their widths
    ms: float = math.nan
    p20: float = math.nan
    p80: float = math.nan
    host_ms: float = math.nan  # until all is launched, where the device is no brake
    busy_ms: float = math.nan  # in which the device works
    launches: float = math.nan
    model_ms: float = math.nan  # busy, as cost_model.py has it
    tokens_per_s: float = math.nan  # without padding
    model_mb: float = math.nan  # the packed model, its adapters and their optimizer
    peak_mb: float = math.nan
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) and self.provider.startswith("lorakit")


@dataclass
class Part:
    """What is on disk of a part."""

    heading: str = ""
    rows: list[Any] = field(default_factory=list)  # StepRow or Row
    ended: str = ""  # why rows are missing at its end


class Record:
    """The file of rows."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, part: str, heading: str) -> None:
        """Forget the rows of a part, and say on what new ones are measured."""
        kept = [line for line in self._lines() if line["part"] != part]
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        fresh = self.path.with_name(self.path.name + ".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(self.path)
        self._append(part, {"heading": heading})

    def add(self, part: str, row: StepRow | Row) -> None:
        """Write a row."""
        known = {name: value for name, value in asdict(row).items() if value == value}
        if not row.error:
            del known["error"]
        self._append(part, known)

    def end(self, part: str, why: str) -> None:
        """Say why a part has no more rows."""
        self._append(part, {"ended": why})

    def parts(self) -> dict[str, Part]:
        """Return what is there."""
        found: dict[str, Part] = {}
        for line in self._lines():
            name = line.pop("part")
            part = found.setdefault(name, Part())
            if "heading" in line:
                part.heading = line["heading"]
            elif "ended" in line:
                part.ended = line["ended"]
            else:
                kind = StepRow if name in STEPS else Row
                names = {f.name for f in fields(kind)}
                part.rows.append(kind(**{k: v for k, v in line.items() if k in names}))
        return found

    def _append(self, part: str, values: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **values}) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        found = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # the last one, of a run that was killed
                    found.append(json.loads(line))
        return found


# ---- tables -------------------------------------------------------------------------------------


def number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown; the first cells stand on the left."""
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def step_table(rows: list[StepRow]) -> str:
    titles = [
        "provider", "rows", "tokens", "ms", "p20", "p80", "host ms", "busy ms", "launches",
        "model ms", "tokens/s", "model MB", "peak MB",
    ]  # fmt: skip
    return table(titles, [
        [row.provider, row.rows, str(row.tokens),
         *(number(v, 1) for v in (row.ms, row.p20, row.p80, row.host_ms, row.busy_ms)),
         number(row.launches, 0), number(row.model_ms, 1),
         *(number(v, 0) for v in (row.tokens_per_s, row.model_mb, row.peak_mb))]
        for row in rows if not row.error
    ])  # fmt: skip


def op_table(rows: list[Row]) -> str:
    titles = ["op", "shape", "provider", "ms", "p20", "p80", "GB/s", "copy", "x", "MB"]
    return table(titles, [
        [row.op, row.shape, row.provider, *(number(v, 3) for v in (row.ms, row.p20, row.p80)),
         number(row.gb_per_s, 0), number(row.copy, 2), number(row.x, 2), number(row.mb, 1)]
        for row in rows if not row.error
    ])  # fmt: skip


def by_rows(rows: list[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """The products with a packed matrix: matrix -> provider -> M -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if not row.error:
            M, _, matrix = row.shape.partition(" x ")
            found.setdefault(matrix, {}).setdefault(row.provider, {})[int(M)] = row.ms
    return found


def few_rows(found: dict[str, dict[int, float]]) -> tuple[int, int] | None:
    """What FEW_ROWS of kernels/ops/frozen_linear should say: up to how many rows one at a time is
    the fastest, and up to how many one of the two ways beats dequantizing; of those measured.
    """
    vector, tiles, dense = (found.get(name, {}) for name in (*WAYS, "dequantize, torch"))
    counts = sorted(vector.keys() & tiles.keys() & dense.keys())
    if not counts:
        return None
    packed = list(takewhile(lambda M: min(vector[M], tiles[M]) < dense[M], counts))
    single = list(takewhile(lambda M: vector[M] <= tiles[M], packed))
    return max(single, default=0), max(packed, default=0)


def product_tables(rows: list[Row]) -> str:
    parts = []
    for matrix, found in by_rows(rows).items():
        counts = sorted({M for times in found.values() for M in times})
        cells = [
            [name, *(number(times.get(M, math.nan), 4) for M in counts)]
            for name, times in found.items()
        ]
        parts.append(table([f"{matrix}, ms for M =", *map(str, counts)], cells))
        best = few_rows(found)
        if best is not None:
            parts.append(f"For {matrix} the crossover is FewRows{best}.\n")
    return "\n".join(parts)


def section(name: str, part: Part) -> list[str]:
    """The lines of a part."""
    made = {"ops": op_table, "products": product_tables}.get(name, step_table)
    shapes = {row.layers for row in part.rows if name in STEPS and row.layers}
    said = f"{part.heading}\n"
    if shapes:
        said = f"{', '.join(sorted(shapes))}, r = {RANK}. {said}"
    lines = [f"## {PARTS[name]}\n", said, made(part.rows)]
    missing = [row.provider for row in part.rows if row.error == NOT_INSTALLED]
    lines += [f"Not installed: {', '.join(missing)}.\n"] if missing else []
    return [*lines, f"{part.ended}\n"] if part.ended else lines


def failures(parts: dict[str, Part]) -> str:
    lines = []
    for name, part in parts.items():
        for row in part.rows:
            if row.error in ("", NOT_INSTALLED):
                continue
            what = f"{row.op} {row.shape}" if name not in STEPS else (
                f"QLoRA step, {row.tokens} tokens, {row.rows}")  # fmt: skip
            lines.append(f"- {what}, {row.provider}: {row.error}\n")
    return "".join(lines) or "Nothing.\n"


def markdown(parts: dict[str, Part]) -> str:
    """Return the report of all the parts that are there."""
    found = {name: parts[name] for name in PARTS if name in parts}
    return "\n".join([
        "# On a GPU\n",
        "`python benchmarks/gpu.py`. Each part says when and on what it was measured.\n",
        "Medians, with the 20th and 80th percentile; `-` where a figure was not taken.\n",
        "Of a step: `host ms` until everything is launched, `busy ms` in which the GPU works and "
        "its `launches` (torch's\nprofiler), `model ms` of work that `cost_model.py` predicts; "
        "tokens/s without padding. Rows that are `packed` are\nragged, with labels on 40 % of "
        "their tokens: lorakit joins them, the peers pad them, which makes 45 % of padding.\n",
        "Of an op: `GB/s`: the bytes that must move, each tensor once; `copy`: that over a copy's; "
        "`x`: the time of the\nfastest peer over this one's; `MB`: the peak of memory beyond the "
        "inputs, for backward with its forward.\n",
        *(line for name, part in found.items() for line in section(name, part)),
        "## Failed\n",
        failures(found),
    ])  # fmt: skip


def save_plot(parts: dict[str, Part], path: Path) -> None:
    """Left the bandwidth of the ops that memory bounds, right the products over their rows."""
    from matplotlib.figure import Figure

    rows = [r for name in ("ops", "products") for r in parts.get(name, Part()).rows if not r.error]
    streams = [r for r in rows if r.op.partition(" ")[0] not in ARITHMETIC]
    groups = len({(row.op, row.shape) for row in streams})
    products = by_rows([row for row in rows if row.op == "frozen_linear"])
    figure = Figure(figsize=(15, max(8, 0.4 * groups)), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_bars(streams, left.subplots())
    panels = right.subplots(max(1, len(products)), squeeze=False)[:, 0]
    for axes, (matrix, found) in zip(panels, products.items(), strict=False):
        for provider, times in found.items():
            axes.plot(list(times), list(times.values()), marker="o", label=provider)
        counts = sorted({M for times in found.values() for M in times})
        axes.set(xscale="log", yscale="log", xlabel="rows M", ylabel="ms", title=matrix)
        axes.set_xticks(counts, [str(M) for M in counts], minor=False)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
