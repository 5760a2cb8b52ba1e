"""comparison.json: what all runs of a comparison show, task by task, and how they differ.

Runs that differ in their seed alone make one row of a task's table (scores.py says how their
scores become one). Everything is computed from what the runs have written, so the file can be
written again at any time, with new metrics too.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

from lorakit.comparison.recommend import recommend
from lorakit.comparison.record import predictions_file, read_predictions
from lorakit.comparison.scores import (
    Difference,
    Measure,
    difference,
    measure_losses,
    measure_means,
    measure_texts,
    pooled,
    together,
)
from lorakit.comparison.work import Job
from lorakit.config.comparison import BERT_SCORE, UNTRAINED, ComparisonConfig
from lorakit.config.errors import LorakitError
from lorakit.evaluation.completions import Completion

VERSION = 1
LOSSES = ("perplexity", "bits_per_byte")
OF_LABELS = ("macro_f1", "weighted_f1")


class Results:
    """What the runs of a comparison show so far; numbers of finished runs are computed once."""

    def __init__(
        self, config: ComparisonConfig, jobs: Sequence[Job], notes: Sequence[str], created: str
    ):
        self.config, self.jobs, self.created = config, jobs, created
        of_rows = {job.run.task: job.rows.notes for job in jobs}
        self.notes = [*(note for each in of_rows.values() for note in each), *notes]
        self.exports: dict[str, dict[str, Any]] = {}
        self._known: dict[Any, Any] = {}

    def values(self) -> dict[str, Any]:
        """Return the values of comparison.json."""
        tasks = [_Task(self, name).values() for name in self.config.tasks]
        values = {
            "version": VERSION,
            "name": self.config.name,
            "created": self.created,
            "grid": {
                "models": dict(self.config.models),
                "tasks": list(self.config.tasks),
                "settings": {name: dict(said) for name, said in self.config.settings.items()},
                "seeds": list(self.config.seeds),
                "base": dict(self.config.base),
            },
            "runs": [_said(job) for job in self.jobs],
            "tasks": tasks,
            "notes": self.notes,
        }
        values["recommendation"] = recommend(values)
        finite: dict[str, Any] = _finite(values)
        return finite

    def known(self, key: Any, compute: Any) -> Any:
        """Return what `compute` returned for a key the first time."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _said(job: Job) -> dict[str, Any]:
    """Return what comparison.json says of a run."""
    run = job.run
    said: dict[str, Any] = {
        "id": run.id,
        "model": run.model,
        "task": run.task,
        "settings": run.settings,
    }
    said |= {"seed": run.seed, "folder": f"runs/{run.id}", "state": job.record.state}
    return said | ({"error": job.record.error} if job.record.error else {})


class _Task:
    """The part of comparison.json about one task."""

    def __init__(self, results: Results, name: str):
        self.results, self.name = results, name
        self.said = results.config.tasks[name]
        jobs = [job for job in results.jobs if job.run.task == name]
        self.test_rows = len(jobs[0].rows.parts["test"])
        self.sizes = {part: len(rows) for part, rows in jobs[0].rows.parts.items()}
        self.cells: dict[tuple[str, str], list[Job]] = {}
        for job in jobs:
            if job.record.state == "finished":
                self.cells.setdefault((job.run.model, job.run.settings), []).append(job)

    @cached_property
    def finished(self) -> list[Job]:
        return [job for jobs in self.cells.values() for job in jobs]

    def values(self) -> dict[str, Any]:
        metrics = [*self.said.measured_by, *(m for m in LOSSES if self._has_labels())]
        if not self.said.measured_by:
            metrics = ["bits_per_byte", "perplexity"]
        measures = {name: self._measure(name) for name in metrics} if self.finished else {}
        return {
            "name": self.name,
            "kind": self.said.kind,
            "metrics": metrics,
            "sizes": self.sizes,
            "rows": [self._row(cell, measures) for cell in self.cells],
            "pairs": [
                self._pair(first, second, measure)
                for first, second in combinations(self.cells, 2)
                for measure in measures.values()
                if self._compares(first, second, measure) and self._seeds(first, second)
            ],
        }

    def _has_labels(self) -> bool:
        return all(job.record.losses for job in self.finished)

    def _compares(self, first: Any, second: Any, measure: Measure) -> bool:
        """Whether a metric means the same for two models: perplexity counts tokens, which differ.

        Models whose tokenizers make as many label tokens of the test rows are taken for ones with
        the same tokenizer.
        """
        if measure.metric != "perplexity":
            return True
        one, two = (
            [row[1] for row in self.cells[cell][0].record.losses] for cell in (first, second)
        )
        return one == two

    def _measure(self, metric: str) -> Measure:
        key = "measure", metric, self.name, tuple(job.run.id for job in self.finished)
        return self.results.known(key, lambda: self._measured(metric))

    def _measured(self, metric: str) -> Measure:
        if metric in LOSSES:
            return measure_losses(metric, {j.run.id: j.record.losses for j in self.finished})
        if metric == BERT_SCORE:
            encoder = self.finished[0].encoder()
            scores = {job.run.id: job.record.similarity[encoder] for job in self.finished}
            return measure_means(metric, scores)
        texts = {job.run.id: self._completions(job) for job in self.finished}
        predictions = {id: [each.prediction for each in found] for id, found in texts.items()}
        references = [each.reference for each in next(iter(texts.values()))]
        if metric in OF_LABELS:  # numbered by all labels that occur
            return measure_texts(metric, predictions, references)
        each = [
            self.results.known(
                ("texts", metric, id),
                lambda id=id: measure_texts(metric, {id: predictions[id]}, references),
            )
            for id in predictions
        ]
        return together(each)

    def _completions(self, job: Job) -> list[Completion]:
        path = predictions_file(job.folder, job.run.id)
        found = read_predictions(path)
        if len(found) != self.test_rows:
            raise LorakitError(
                f"{path} has {len(found)} lines for {self.test_rows} rows: remove it to complete "
                "them again"
            )
        return found

    def _row(self, cell: tuple[str, str], measures: dict[str, Measure]) -> dict[str, Any]:
        """Return a row of the table: a model with settings, over its seeds."""
        jobs = self.cells[cell]
        ids = [job.run.id for job in jobs]
        scores = {}
        for name, measure in measures.items():
            found = self.results.known(("score", name, *ids), lambda m=measure: pooled(m, ids))
            scores[name] = {**found._asdict(), "better": measure.better}
        trained = [job.record.trained for job in jobs if job.record.trained]
        seconds = sum(each["seconds"] for each in trained)
        return {
            "run ids": ids,
            "model": cell[0],
            "settings": cell[1],
            "scores": scores,
            "tokens_per_second": sum(t["tokens"] for t in trained) / seconds if seconds else None,
            "seconds": seconds / len(trained) if trained else None,
            "peak_memory_mb": max((t["peak_memory_mb"] for t in trained), default=None),
            "weights_mb": jobs[0].record.weights_bytes / 1e6,
            "trained_parameters": jobs[0].record.trained_parameters,
            "export": self.results.exports.get(cell[0], {}),
        }

    def _pair(
        self, first: tuple[str, str], second: tuple[str, str], measure: Measure
    ) -> dict[str, Any]:
        """Return the difference of two rows of the table in one metric."""
        pairs = self._seeds(first, second)
        found: Difference = self.results.known(
            ("pair", measure.metric, *pairs), lambda: difference(measure, pairs)
        )
        return {
            "first": {"model": first[0], "settings": first[1]},
            "second": {"model": second[0], "settings": second[1]},
            "metric": measure.metric,
            "difference": found.interval._asdict(),
            "p_value": found.p_value,
            "within_noise": found.within_noise,
        }

    def _seeds(self, first: tuple[str, str], second: tuple[str, str]) -> list[tuple[str, str]]:
        """Return the runs of both for each seed that both have; the untrained has every seed."""
        of_first, of_second = (
            {job.run.seed: job.run.id for job in self.cells[cell]} for cell in (first, second)
        )
        if first[1] == second[1] == UNTRAINED:
            return [(of_first[None], of_second[None])]
        pairs = [
            (of_first.get(seed, of_first.get(None)), of_second.get(seed, of_second.get(None)))
            for seed in self.results.config.seeds
        ]
        return [(one, two) for one, two in pairs if one is not None and two is not None]


def _finite(value: Any) -> Any:
    """Return values with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
