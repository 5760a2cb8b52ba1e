"""What the chat can talk to: the adapters in the folder, their bases, and models that were trained.

The adapter of a run that goes on is that of its last checkpoint.

A base is what the run of an adapter names as its model. No other model can be chosen, so a request
cannot make the board read a place or ask a Hub of its own choice.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.board.folder import Folder, NotThereError, is_file, read_end
from lorakit.board.runs import placed, read_record, started_in

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "tokenizer.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MOST = 4 << 20  # bytes of a config


@dataclass(frozen=True)
class Choice:
    """A model that the chat can talk to."""

    name: str
    """Its name: the id of a run, or of a base its place."""
    place: str
    """The path or the Hub id of its files."""
    base: str
    """The name of the base that it needs, which is its own if it is one."""
    run: str | None
    """The id of the run that made it, None if none here did."""
    settings: dict[str, Any]
    """How a run loaded it: the settings "dtype" and "quantize"."""
    stamp: int
    """The time of its files, in nanoseconds; 0 for a base that no run here made."""

    def told(self) -> dict[str, Any]:
        """Return what the page gets."""
        kind = "base" if self.name == self.base else "adapter"
        label = self.run or Path(self.place).name
        return {"name": self.name, "kind": kind, "run": self.run, "base": self.base, "label": label}


def choices(folder: Folder) -> dict[str, Choice]:
    """Return what the chat can talk to, by name: the bases first."""
    bases: dict[str, Choice] = {}
    adapters: dict[str, Choice] = {}
    for id_, run in folder.runs().items():
        record = read_record(run)
        said = record.get("settings")
        said = said if isinstance(said, dict) else {}
        settings = {name: said.get(name) for name in ("dtype", "quantize")}
        adapter = _newest_adapter(run)
        if adapter is not None:
            stamp, place = adapter
            base = _base_of(run, place, record)
            if base is not None:
                bases.setdefault(base, Choice(base, base, base, None, settings, 0))
                adapters[id_] = Choice(id_, str(place), base, id_, settings, stamp)
        elif all(is_file(run / name) for name in MODEL):
            weights = [run / name for name in WEIGHTS if is_file(run / name)]
            if weights:
                stamp = weights[0].stat().st_mtime_ns
                bases[id_] = Choice(id_, str(run), id_, id_, settings, stamp)
    return {**bases, **adapters}


def _newest_adapter(run: Path) -> tuple[int, Path] | None:
    """Return the adapter of a run, or of a checkpoint, that was written last, and when."""
    found = []
    for place in (run, *run.glob("checkpoint-*")):
        if not place.is_symlink() and all(is_file(place / name) for name in ADAPTER):
            with suppress(OSError):  # the run has just removed it
                found.append(((place / ADAPTER[1]).stat().st_mtime_ns, place))
    return max(found, key=lambda each: (each[0], each[1] == run), default=None)


def _base_of(run: Path, place: Path, record: dict[str, Any]) -> str | None:
    """Return the place of the base of a run's adapter, None if nothing says it."""
    base = record.get("model")
    if not isinstance(base, str) or not base:
        try:
            config = json.loads(read_end(place / ADAPTER[0], _MOST)[0])
            base = config.get("base_model_name_or_path")
        except (NotThereError, ValueError, AttributeError, RecursionError):
            return None
    if not isinstance(base, str) or not base or "\0" in base:
        return None
    return placed(base, started_in(run))
