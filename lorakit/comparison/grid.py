"""The grid of a comparison: one run for each task, model, settings and seed, in a fixed order.

A run has an id such as `sentiment--small--r8--s0`, which is the name of its folder. What a name has
that a folder should not becomes a dash, followed by a digest of the name.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config.comparison import UNTRAINED, ComparisonConfig, TaskConfig, flat
from lorakit.config.errors import LorakitError
from lorakit.config.fields import merged
from lorakit.config.objectives import HEADED
from lorakit.config.run import RunConfig
from lorakit.files.local import as_path

_LONGEST_SLUG = 40
# The beginnings of settings that matter to a model without training.
_OF_A_MODEL = ("model", "dtype", "quantize", "chat_template", "add_tokens", "train.train_on")
# What two runs of one kind may differ in: the places of files, and where a run goes on from.
_PLACES = ("train.output_dir", "train.resume", "train.seed", "data.train", "data.validation")


@dataclass(frozen=True)
class GridRun:
    """One run of a comparison: a model, on a task, with settings and a seed."""

    id: str
    """Name of the run's folder."""
    task: str
    """Name of the task."""
    model: str
    """Name of the model."""
    settings: str
    """Name of the settings, "untrained" for a model as it is."""
    seed: int | None
    """Seed of the run; None without training."""
    values: dict[str, Any]
    """Mapping of the run file, as `lorakit train` takes it."""
    config: RunConfig
    """Settings of the run."""
    folder: Path
    """Folder of the run, its output_dir."""

    @property
    def is_trained(self) -> bool:
        """Whether the run trains, and is not a model as it is."""
        return self.settings != UNTRAINED

    def says(self) -> dict[str, Any]:
        """Return all settings in effect by names such as "lora.r", without places and the seed.

        Without training, they are those of the model alone.
        """
        values = flat(self.config)
        values["quantize"] = None if self.config.quantize is None else "as follows"
        if not self.is_trained:
            kept = [name for name in values if name.startswith(_OF_A_MODEL)]
            return {name: values[name] for name in kept}
        return {name: value for name, value in values.items() if name not in _PLACES}


def grid_of(config: ComparisonConfig) -> list[GridRun]:
    """Return the runs of a comparison: task by task, models as they are before trained ones.

    Raises LorakitError if the keys of base, or of some settings, make no run file.
    """
    runs = []
    settings = {**({UNTRAINED: {}} if config.baseline else {}), **config.settings}
    for task, said in config.tasks.items():
        for model, path in config.models.items():
            for name, over in settings.items():
                values = merged(config.base, over)
                for seed in config.seeds if name != UNTRAINED else [None]:
                    parts = [slug(task), slug(model), slug(name)]
                    parts += [] if seed is None else [f"s{seed}"]
                    names = task, model, name, seed
                    runs.append(_run(config, "--".join(parts), names, said, path, values))
    return runs


def _run(
    config: ComparisonConfig,
    id: str,
    names: tuple[str, str, str, int | None],
    said: TaskConfig,
    path: str,
    values: Mapping[str, Any],
) -> GridRun:
    """Return a run, with the run file that `lorakit train` would take."""
    task, model, settings, seed = names
    folder = as_path(config.output_dir) / "runs" / id
    values = {
        "model": path,
        "data": data_of(config, task, said),
        **values,
        "output_dir": str(folder),
        "seed": 0 if seed is None else seed,
        "resume": "auto",
    }
    where = f"base with settings {settings}" if settings != UNTRAINED else "base"
    run = RunConfig.from_dict(values, where)
    if run.train.eval_metrics and "validation" not in values["data"]:
        raise LorakitError(f"task {task}: eval_metrics need validation rows")
    if run.train.objective in HEADED:
        raise LorakitError(
            f"{where}: a comparison measures what models write, and objective "
            f"{run.train.objective} gives them a head that tells no next token"
        )
    return GridRun(id, task, model, settings, seed, values, run, folder)


def data_of(config: ComparisonConfig, task: str, said: TaskConfig) -> dict[str, Any]:
    """Return what the run files of a task say of its data."""
    data: dict[str, Any] = {}
    if said.data is not None:
        folder = task_folder(config, task)
        data = {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
        }
    else:
        data = {"train": said.train}
        data |= {} if said.validation is None else {"validation": said.validation}
    data |= {} if said.format is None else {"format": said.format}
    return data | ({"columns": dict(said.columns)} if said.columns else {})


def task_folder(config: ComparisonConfig, task: str) -> Path:
    """Return the folder of the rows of a task that were divided."""
    return as_path(config.output_dir) / "data" / slug(task)


def slug(name: str) -> str:
    """Return a name as a part of a folder's name; another name gives another part."""
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:_LONGEST_SLUG]
    if kept == name:
        return kept
    return f"{kept or 'x'}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
