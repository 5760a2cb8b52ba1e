"""`compare_models`: make the runs of a grid, and say what they show.

    output_dir/
        runs/ID/                a run folder, as `lorakit train` leaves it, and compared.json
        data/TASK/              train.jsonl, validation.jsonl, test.jsonl of a task that was divided
        predictions/ID.jsonl    what a run makes of the test rows
        comparison.json         all numbers, written after each run
        comparison.md           the same as tables
        votes.jsonl             blind votes (votes.py)

A run that is finished is not made again, one that was interrupted goes on from its checkpoint, and
one that failed is tried again. Ctrl-C ends the comparison after the current step.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.comparison.at_once import make_at_once
from lorakit.comparison.exported import known_exports, measure_exports
from lorakit.comparison.grid import GridRun, grid_of
from lorakit.comparison.record import fingerprint, read_record, write_record
from lorakit.comparison.results import Results
from lorakit.comparison.rows import TaskRows, open_task, write_task
from lorakit.comparison.table import as_markdown, as_text
from lorakit.comparison.work import Job, attempt
from lorakit.config.comparison import BERT_SCORE, ComparisonConfig
from lorakit.config.errors import LorakitError, check, nearest, one_of
from lorakit.data.encode import Encoder
from lorakit.data.schemas import Row
from lorakit.evaluation.metrics import check_usable
from lorakit.files.local import as_path, read_json, read_text, write_json, write_text
from lorakit.files.yaml_text import parse_yaml
from lorakit.models.gguf_mix import FILE_TYPES
from lorakit.models.tokenizer import Tokenizer
from lorakit.models.tokenizer_files import load_tokenizer
from lorakit.training.log import say
from lorakit.training.state import only_run_in

FILE, PAGE = "comparison.json", "comparison.md"


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison shows; it prints as tables."""

    folder: Path
    """Directory of the comparison."""
    values: dict[str, Any]
    """Values of comparison.json."""
    interrupted: bool = False
    """Whether Ctrl-C or SIGTERM ended it before its last run."""

    @property
    def failed(self) -> dict[str, str]:
        """The reason of each run that failed, by its id."""
        runs = self.values["runs"]
        return {run["id"]: run["error"] for run in runs if run["state"] == "failed"}

    def __str__(self) -> str:
        return as_text(self.values)


@dataclass(frozen=True)
class ComparedRun:
    """One run that a comparison would make."""

    run: GridRun
    """The run: its id, its names and its settings."""
    state: str
    """What is known of it: waiting, finished, failed or stopped."""
    lengths: Sequence[int]
    """Number of tokens of each row to train on."""
    sizes: dict[str, int]
    """Number of rows of each part of the task."""


def compare_models(
    config: ComparisonConfig | Mapping[str, Any] | str | Path,
    *,
    only: str | None = None,
    at_once: int = 1,
) -> ComparisonResult:
    """Fine-tune models on tasks with everything else equal, and say how they differ.

    All runs of a task have the same rows in the same order, the same test rows and the same
    schedule. The same call goes on where an earlier one ended.

    Args:
        config: The settings of the comparison, the mapping of its file, or the file's path.
        only: A part of the ids of the runs to make, such as the name of a task. Others are shown if
            they are finished.
        at_once: How many runs are made at once. With more than 1 each is a process of its own, on
            the next GPU in turn or with its share of the cores, and prints to output.log in its
            folder. All of them must fit the memory together.

    Returns:
        The scores of all finished runs with their intervals, paired tests and a recommendation.

    Raises:
        LorakitError: at_once is below 1, the settings, a model's tokenizer or the rows of a task
            cannot be used, a finished run was made with other settings, or another process works
            in output_dir. A run that fails by itself is noted, and the others go on.
    """
    check(at_once >= 1, f"compare: at_once is {at_once}, and at least 1 run is made at once")
    config = _settings(config)
    folder = as_path(config.output_dir)
    jobs, notes = jobs_of(config)
    chosen = _chosen(jobs, only)
    folder.mkdir(parents=True, exist_ok=True)
    with only_run_in(folder):
        for rows in {job.run.task: job.rows for job in jobs}.values():
            write_task(rows)
        results = Results(config, jobs, notes, _created(folder))
        results.exports = known_exports(config)
        work = _Work(folder, jobs, results)
        if at_once == 1:
            interrupted = work.through(chosen)
        else:
            interrupted = make_at_once(chosen, at_once, work.note)
        if config.exports and not interrupted:
            results.exports = measure_exports(jobs, say)
        return ComparisonResult(folder, work.write(), interrupted)


def plan_comparison(
    config: ComparisonConfig | Mapping[str, Any] | str | Path, *, only: str | None = None
) -> list[ComparedRun]:
    """Return the runs that `compare_models` would make, without making or writing anything.

    Args:
        config: The settings of the comparison, the mapping of its file, or the file's path.
        only: A part of the ids of the runs to return, as `compare_models` takes it.

    Returns:
        A run for each task, model, settings and seed, in the order in which they are made.

    Raises:
        LorakitError: As `compare_models`.
    """
    config = _settings(config)
    jobs, _ = jobs_of(config)
    encoders: dict[str, Encoder] = {}
    lengths: dict[tuple[str, str], list[int]] = {}
    planned = []
    for job in _chosen(jobs, only):
        run = job.run
        key = run.task, _reading(run, encoders)
        if key not in lengths:
            by_row, _ = _lengths(encoders[key[1]], job.rows.parts["train"])
            lengths[key] = [length for of_row in by_row for length in of_row]
        sizes = {part: len(rows) for part, rows in job.rows.parts.items()}
        planned.append(ComparedRun(run, job.record.state, lengths[key], sizes))
    return planned


def read_comparison(folder: str | Path) -> ComparisonResult:
    """Read a comparison that `compare_models` has written.

    Args:
        folder: The output_dir of the comparison.

    Returns:
        The comparison, which prints as tables.

    Raises:
        LorakitError: The folder holds no comparison, or one that is damaged.
    """
    folder = as_path(folder)
    values = read_json(folder / FILE)
    if values.get("version") != 1 or not isinstance(values.get("tasks"), list):
        raise LorakitError(f"{folder / FILE} is no comparison, or one of another version")
    found = ComparisonResult(folder, values)
    try:
        str(found)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise LorakitError(
            f"{folder / FILE} is damaged: call compare with the comparison file, which writes it "
            "again"
        ) from None
    return found


def _settings(config: ComparisonConfig | Mapping[str, Any] | str | Path) -> ComparisonConfig:
    """Return the settings of a comparison after the checks that take no time."""
    if isinstance(config, (str, Path)):
        values = parse_yaml(read_text(as_path(config)))
        config = ComparisonConfig.from_dict(values, str(config))
    if not isinstance(config, ComparisonConfig):
        config = ComparisonConfig.from_dict(config)
    for task in config.tasks.values():
        check_usable([metric for metric in task.measured_by if metric != BERT_SCORE])
    for name in config.exports:
        if name not in FILE_TYPES:
            hint = nearest(name, FILE_TYPES)
            raise LorakitError(f"exports: {name!r} is not {one_of([*FILE_TYPES])}{hint}")
    return config


def _created(folder: Path) -> str:
    """Return when a comparison was begun; now if no comparison.json tells, or a damaged one."""
    created = None
    if (folder / FILE).exists():
        with suppress(LorakitError):  # it is written again in a moment
            created = read_json(folder / FILE).get("created")
    if isinstance(created, str):
        return created
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ---- what is to be done ----


def jobs_of(config: ComparisonConfig) -> tuple[list[Job], list[str]]:
    """Return the runs with what is known of them, and notes on how models see the rows."""
    rows = {name: open_task(config, name) for name in config.tasks}
    runs, notes = _in_one_order(grid_of(config), rows)
    prints = {name: fingerprint(path) for name, path in config.models.items()}
    jobs = []
    for run in runs:
        digests = rows[run.task].digests
        made_with = {**run.says(), "files of the model": prints[run.model]}
        if run.is_trained:
            made_with |= {f"{part} rows": d for part, d in digests.items() if part != "test"}
        record = read_record(run, made_with)
        if record.state == "running":  # it was killed
            record.state = "stopped"
        job = Job(config, run, record, rows[run.task], digests["test"])
        if record.state == "finished" and not job.is_measured():
            record.state = "waiting"  # for a metric that is new in the file
        jobs.append(job)
    return jobs, notes


def _chosen(jobs: Sequence[Job], only: str | None) -> list[Job]:
    """Return the runs with a text in their id; raise LorakitError if there is none."""
    chosen = [job for job in jobs if only is None or only in job.run.id]
    if not chosen:
        raise LorakitError(f"no run has {only!r:.60} in its id; ids are {jobs[0].run.id} and so on")
    return chosen


def _in_one_order(
    runs: list[GridRun], rows: Mapping[str, TaskRows]
) -> tuple[list[GridRun], list[str]]:
    """Let all runs of a task see its rows in one order, and say where they cannot.

    Batches hold rows of like length, and tokenizers disagree about lengths. So batches are made
    without regard to them as soon as two runs cut the rows into other tokens.
    """
    notes = list[str]()
    encoders: dict[str, Encoder] = {}
    of_run = {run.id: _reading(run, encoders) for run in runs if run.is_trained}
    for task, of_task in rows.items():
        same_task = [run for run in runs if run.task == task]
        readings = {of_run[run.id]: run for run in same_task if run.is_trained}
        if len(readings) == 1:
            continue
        seen = {key: _lengths(encoders[key], of_task.parts["train"]) for key in readings}
        first, *others = (lengths for lengths, _ in seen.values())
        if all(lengths == first for lengths in others):
            continue
        long = {readings[key].model: count for key, (_, count) in seen.items() if count}
        if long:
            said = ", ".join(f"{count} by {model}" for model, count in long.items())
            notes.append(f"task {task}: rows become other tokens, and so are cut: {said}")
        if any(run.config.train.packing for run in same_task):
            notes.append(
                f"task {task}: rows become other tokens, and have no order to pack them in"
            )
        runs = [_without_groups(run) if run.task == task else run for run in runs]
    return runs, notes


def _reading(run: GridRun, encoders: dict[str, Encoder]) -> str:
    """Return what decides about the tokens of a run's rows, with its encoder in `encoders`."""
    config = run.config
    said = (config.chat_template, config.add_tokens, config.train.max_seq_length)
    key = repr((config.model, *said, config.train.over_length, config.train.train_on))
    if key not in encoders:
        encoders[key] = _encoder(run, _tokenizer(run))
    return key


def _lengths(encoder: Encoder, rows: Sequence[Row]) -> tuple[list[list[int]], int]:
    """Return the tokens of each example of each row, and how many rows were too long."""
    before = encoder.long
    lengths = [[len(each.answers[0].input_ids) for each in encoder.examples(row)] for row in rows]
    return lengths, encoder.long - before


def _without_groups(run: GridRun) -> GridRun:
    train = replace(run.config.train, group_by_length=False)
    values = {**run.values, "group_by_length": False}
    return replace(run, config=replace(run.config, train=train), values=values)


def _tokenizer(run: GridRun) -> Tokenizer:
    tok = load_tokenizer(run.config.model, chat_template=run.config.chat_template)
    tok.add_special_tokens(run.config.add_tokens)
    return tok


def _encoder(run: GridRun, tok: Tokenizer) -> Encoder:
    train = run.config.train
    return Encoder(
        tok,
        max_seq_length=train.max_seq_length,
        over_length=train.over_length,
        train_on=train.train_on,
    )


# ---- doing it ----


class _Work:
    """The runs of a comparison, and the files that say what they show."""

    def __init__(self, folder: Path, jobs: Sequence[Job], results: Results):
        self.folder, self.jobs, self.results = folder, jobs, results

    def through(self, chosen: Sequence[Job]) -> bool:
        """Make the chosen runs that are not finished, one after the other.

        Return whether a signal has ended that.
        """
        for number, job in enumerate(chosen, 1):
            if job.record.state == "finished":
                continue
            self.note(job, "running", None)
            say(f"run {number} of {len(chosen)}: {job.run.id}")
            state, error = attempt(job, say)
            self.note(job, state, error)
            if state == "stopped":
                return True
        return False

    def note(self, job: Job, state: str, error: str | None) -> None:
        """Write down the state of a run, and why it failed."""
        job.record.state, job.record.error = state, error
        write_record(job.run, job.record)
        self.write()

    def write(self) -> dict[str, Any]:
        """Write comparison.json and comparison.md, and return the values of the former."""
        values = self.results.values()
        write_json(self.folder / FILE, values)
        write_text(self.folder / PAGE, as_markdown(values))
        return values
