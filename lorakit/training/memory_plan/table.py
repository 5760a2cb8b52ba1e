"""A forecast as plain text: a table with bars, the peak, and what is left of the device."""

from lorakit.training.memory_plan.cards import Card
from lorakit.training.memory_plan.plan import MemoryPlan
from lorakit.training.units import format_bytes

NUMBERS = 3 + 13 + 2 + 11 + 2  # the columns between a kind's name and its bar


def plan_table(plan: MemoryPlan, card: Card | None = None, *, width: int = 100) -> str:
    """Return a forecast as a table with bars.

    Args:
        plan: The forecast.
        card: The device that it is for; None shows what is needed alone.
        width: The most characters of a line, at least 70.

    Returns:
        The lines: each kind of memory with its bytes between two steps and at the peak, and a bar
        of what it takes at the peak, as a part of all that is taken then. All bars have one scale,
        so that their lengths can be added. The last but one says what part of the device that is.
    """
    context = 0 if card is None else card.context
    whole = max(plan.reserved + context, 1)
    rows = _kinds(plan, whole)
    rows.append(("allocator's rounding", 0, plan.reserved - plan.peak))
    rows.append(("CUDA context (allowance)", context, context))
    rows = [row for row in rows if row[1] or row[2]]
    names = max(len("allocator's rounding"), *(len(name) for name, _, _ in rows))
    bars = max(10, width - names - NUMBERS)
    lines = [f"{'':{names}}   between steps  at the peak"]
    for name, between, peak in rows:
        lines.append(_line(name, names, between, peak, round(bars * peak / whole)))
    between, peak = sum(row[1] for row in rows), sum(row[2] for row in rows)
    lines.append(_line("together", names, between, peak, 0))
    if card is not None:
        share = f"{100 * whole / max(card.memory, 1):.0f} %"
        lines.append(f"{'':{names}}   {'':13}  {share:>11}  of {format_bytes(card.memory)}")
    lines.append(f"each # is {format_bytes(round(whole / bars))}")
    return "\n".join(lines)


def plan_line(plan: MemoryPlan, memory: int) -> str:
    """Return a forecast as one line, for the start of a run.

    Args:
        plan: The forecast.
        memory: The bytes that the run may take.
    """
    needs = f"{_in_units_of(plan.reserved, memory)} of {format_bytes(memory)}"
    host = f"; {format_bytes(plan.host)} of host memory" if plan.host else ""
    return f"memory: needs {needs}, most in {plan.when}{host}"


def _in_units_of(size: int, memory: int) -> str:
    """Return a size without its unit if that is the unit of `memory`: "7.4" of 24.0 GB."""
    text, unit = format_bytes(size), format_bytes(memory).split()[1]
    return text.removesuffix(f" {unit}")


def _kinds(plan: MemoryPlan, whole: int) -> list[tuple[str, int, int]]:
    """Return each kind of memory with its bytes between two steps and at the peak.

    What is kept between steps comes before what a step makes, and the most comes first. Kinds of
    less than a thousandth of `whole` are one.
    """
    names = {**dict.fromkeys(plan.resident, 0), **plan.at_peak}
    rows = [(name, plan.resident.get(name, 0), peak) for name, peak in names.items()]
    large = [row for row in rows if 1000 * max(row[1:]) >= whole]
    small = [row for row in rows if row not in large]
    large.sort(key=lambda row: (2 * row[1] < row[2], -row[2]))
    other = [("other", sum(row[1] for row in small), sum(row[2] for row in small))]
    return [*large, *other]


def _line(name: str, names: int, between: int, peak: int, bar: int) -> str:
    numbers = "  ".join(
        f"{format_bytes(size) if size >= 1000 else '-':>{width}}"
        for size, width in ((between, 13), (peak, 11))
    )
    return f"{name:{names}}   {numbers}  {'#' * bar}".rstrip()
