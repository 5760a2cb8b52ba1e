"""What is known of one run: compared.json in its folder, so that nothing is computed twice.

It holds what the run was made with, what training did, and the loss of each test row. A run whose
settings, model or rows are no longer those of the file is refused. So no table ever holds numbers
of two kinds under one name.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorakit.comparison.grid import GridRun
from lorakit.config.comparison import flat
from lorakit.config.data import DataConfig
from lorakit.config.errors import LorakitError
from lorakit.config.run import RunConfig
from lorakit.evaluation.completions import Completion, read_completions
from lorakit.files.local import as_path, read_json, write_json
from lorakit.training.state import checkpoints

FILE = "compared.json"
_BEGINNING = 1 << 20  # bytes of a file of weights that its fingerprint takes,
_PLACES, _PART = 64, 1 << 14  # and places after them, with bytes of each: training changes layers


@dataclass
class Record:
    """What is known of one run."""

    made_with: dict[str, Any]
    """Settings in effect, and the fingerprints of the model and the rows."""
    state: str = "waiting"
    """One of waiting, running, finished, failed and stopped."""
    error: str | None = None
    """Why it failed."""
    trained: dict[str, float] | None = None
    """What training did: steps, tokens, seconds, loss and so on."""
    tested_on: str | None = None
    """Digest of the test rows that `losses` and the predictions are of."""
    losses: list[list[float]] = field(default_factory=list)
    """Loss of each test row in nats, its label tokens, and the bytes of its answer."""
    weights_bytes: int = 0
    """Size of the model in memory, adapter included."""
    trained_parameters: int = 0
    """Number of parameters that were trained."""
    similarity: dict[str, Any] = field(default_factory=dict)
    """BERTScore F1 of each row by the fingerprint of the encoder."""


def read_record(run: GridRun, made_with: dict[str, Any]) -> Record:
    """Return what is known of a run, or a new record if nothing is.

    Settings that the run has never heard of, since they are newer, had their defaults. Raises
    LorakitError if the run in the folder was made with something else.
    """
    path = run.folder / FILE
    made_with = json.loads(json.dumps(made_with))  # as the file would say it
    if not path.exists():
        return Record(made_with)
    values = read_json(path)
    if set(values) != {f.name for f in fields(Record)} or not isinstance(values["made_with"], dict):
        raise LorakitError(f"{path} is of another version of lorakit: remove {run.folder}")
    before = {**flat(RunConfig("", DataConfig(""))), **values["made_with"]}
    differ = [key for key, value in made_with.items() if before.get(key) != value]
    if differ and not _has_results(run, values):
        return Record(made_with)
    if differ:
        key = differ[0]
        raise LorakitError(
            f"{run.folder} was made with {key} {before.get(key)!r:.60}, and now it is "
            f"{made_with.get(key)!r:.60}: remove that folder to make the run again, or choose "
            "another output_dir"
        )
    return Record(**values)


def _has_results(run: GridRun, values: dict[str, Any]) -> bool:
    """Whether a run has come so far that something of it would be mixed with something else."""
    return bool(values["trained"] or values["tested_on"] or checkpoints(run.folder))


def write_record(run: GridRun, record: Record) -> None:
    """Write what is known of a run into its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / FILE, asdict(record))


def read_again(run: GridRun, record: Record) -> None:
    """Bring a record up to date with its file, which another process has written."""
    for name, value in read_json(run.folder / FILE).items():
        setattr(record, name, value)


def fingerprint(model: str) -> str:
    """Return a text that changes with the files of a model; the id of one that is on the Hub."""
    path = as_path(model)
    if not path.exists():
        return model
    found = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        if file.is_file() and file.suffix in (".gguf", ".safetensors", ".json", ".jinja", ".model"):
            found.update(f"{file.name} {file.stat().st_size}".encode())
            with open(file, "rb") as opened:
                found.update(opened.read(_BEGINNING))
                size = file.stat().st_size
                for place in range(_BEGINNING, size, max(_PART, (size - _BEGINNING) // _PLACES)):
                    opened.seek(place)
                    found.update(opened.read(_PART))
    return found.hexdigest()


def predictions_file(folder: Path, run: str) -> Path:
    """Return where the completions of a run lie, by its id, for the folder of a comparison."""
    return folder / "predictions" / f"{run}.jsonl"


def read_predictions(path: Path) -> list[Completion]:
    """Return the completions of a run.

    Raises LorakitError, which says what to do, if the file is damaged.
    """
    try:
        return read_completions(path)
    except LorakitError as error:
        raise LorakitError(
            f"{error}: remove the file, and compare again to complete the rows"
        ) from None
