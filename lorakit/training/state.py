"""Checkpoints of a run: directories that hold all that the next step depends on.

    output_dir/checkpoint-40/
        adapter_model.safetensors, adapter_config.json     the adapter, as `save_adapter` writes it
        state.safetensors       every trained tensor as it is, the optimizer's state, and the
                                reference of DPO
        state.json              the step, counts, evaluations, and what a resumed run must share

With `train: full` the files of the whole model are in the place of the adapter's, and the state has
no second copy of its weights.

A checkpoint is whole or absent: it is written under another name, flushed to the disk, and renamed.
One that was there before goes under a name beside it meanwhile, and from there back if the new one
never came. A run that is killed at any moment leaves the earlier checkpoints, and at most
directories with names that start with a dot, which the next run puts back or removes. A full disk
leaves the earlier checkpoints too. The place of a run in its data follows from the step alone,
since seed and epoch decide the order of the rows. So do its random numbers: seed and micro-batch
decide what is drawn (draws.py).
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.manage import attached
from lorakit.config.errors import LorakitError
from lorakit.files.local import errors_name, read_json, write_json
from lorakit.files.safetensors import LazyTensor, open_safetensors, write_safetensors
from lorakit.training.adamw import AdamW
from lorakit.training.divided import DividedWeights

STATE_TENSORS, STATE_VALUES = "state.safetensors", "state.json"
_TRIES, _MOMENT = 4, 0.05  # how often a lock is asked for, and the seconds between


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk."""

    path: Path
    step: int


def checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, the oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if number and (path / STATE_VALUES).is_file():
            found.append(Checkpoint(path, int(number.group(1))))
    return sorted(found, key=lambda each: each.step)


def write_checkpoint(
    output_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    save: Callable[[Path], None],
) -> Checkpoint:
    """Write checkpoint-`step`, whole or not at all. Raises OSError if the disk is full.

    tensors and values go into the state's files; `save` writes what was trained to a directory.
    """
    path = output_dir / f"checkpoint-{step}"
    write_whole(path, tensors, values, save)
    return Checkpoint(path, step)


def write_whole(
    path: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    save: Callable[[Path], None],
) -> None:
    """Write a directory as checkpoints are, whole or not at all, in the place of what is at `path`.

    Whoever is killed meanwhile leaves the old one or the new one whole; `recover` puts it in place.

    Raises OSError if the disk is full.
    """
    recover(path)
    temporary = path.parent / f".{path.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with errors_name(path, temporary):
            temporary.mkdir()
            save(temporary)
            write_safetensors(temporary / STATE_TENSORS, tensors)
            write_json(temporary / STATE_VALUES, values)
            _flush(temporary)
            if path.exists():
                os.rename(path, _put_aside(path))
            os.rename(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover(path)


def recover(path: Path) -> None:
    """Put the directory at `path` back if `write_whole` was killed before the new one was there."""
    aside = _put_aside(path)
    if aside.exists() and not path.exists():
        os.rename(aside, path)
    shutil.rmtree(aside, ignore_errors=True)


def _put_aside(path: Path) -> Path:
    """Return where the directory at `path` goes while another one takes its place."""
    return path.parent / f".{path.name}.old"


def _flush(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(output_dir: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints except the last `keep` and that of step `best`."""
    remove([each for each in checkpoints(output_dir)[:-keep] if each.step != best])


def remove(found: Iterable[Checkpoint]) -> None:
    """Remove checkpoints."""
    for each in found:
        shutil.rmtree(each.path)


@contextmanager
def only_run_in(output_dir: Path) -> Iterator[None]:
    """Hold a lock within the block, so that no other run trains into `output_dir`.

    The lock ends with the process at the latest. Who looks whether a run goes on may hold it for a
    moment, so it is asked for some times. The time of the file says since when it is held. Raises
    LorakitError if another run holds it, or nothing can be written there.
    """
    try:
        lock = os.open(output_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise LorakitError(
            f"train: output_dir {output_dir} cannot be written to ({error.strerror}); choose "
            "another name"
        ) from None
    with os.fdopen(lock, "w") as file:
        for _ in range(_TRIES):
            if _locked(file.fileno()):
                break
            time.sleep(_MOMENT)
        else:
            raise LorakitError(
                f"train: another run is training into {output_dir}; choose another output_dir"
            )
        os.utime(file.fileno())
        yield


def _locked(file: int) -> bool:
    """Lock a file, and return whether that was possible."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def kept_elsewhere(
    output_dir: Path, what: str, save: Callable[[Path], None] | None, error: OSError
) -> str:
    """Save what a run has made in the system's directory for temporary files.

    Args:
        output_dir: The directory that it could not be written to.
        what: What it is.
        save: Writes it to a directory; None: it cannot be written again.
        error: What came in between.

    Returns:
        A sentence that says where it is, or which checkpoint is the last.
    """
    sentence = f"the {what} could not be written to {output_dir} ({error.strerror or error})"
    if save is not None:
        path = Path(tempfile.mkdtemp(prefix="lorakit-"))
        try:
            save(path)
            return f"{sentence}; it is in {path}"
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
    found = checkpoints(output_dir)
    last = f"the last checkpoint is {found[-1].path}" if found else "there is no checkpoint"
    return f"{sentence}; {last}"


def remove_unfinished(output_dir: Path) -> None:
    """Remove the unfinished checkpoints of runs that were killed, and put back what was aside."""
    for path in output_dir.glob(".checkpoint-*.old"):
        recover(output_dir / path.name.removeprefix(".").removesuffix(".old"))
    for path in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# ---- the contents of a checkpoint ----


def sum_of_bits(t: Tensor) -> int:
    """Return the sum of the bits of a tensor, read as whole numbers: cheap to compare."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return int(t.detach().view(whole).sum(dtype=torch.int64))


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every tensor of the selected adapter by name, as it is in memory.

    They are its parameters, and the tensors that these started from. A tensor that several layers
    share, as those of VeRA do, is there once.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for place, each in attached(module).items():
        if each.selected is not None:
            for name, tensor in each.adapters[each.selected].state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"adapter.{place}.{name}"] = tensor
    return found


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a checkpoint by name, still on disk, `trained_tensors` among them."""
    return open_safetensors(path / STATE_TENSORS)


def has_tensors_of(path: Path, module: nn.Module) -> bool:
    """Return whether the checkpoint at `path` has the tensors of the selected adapter, by name."""
    theirs = {name for name in read_tensors(path) if name.startswith("adapter.")}
    return theirs == trained_tensors(module).keys()


def optimizer_tensors(optimizer: AdamW) -> dict[str, Tensor]:
    """Return the optimizer's state by name, which holds the number of the parameter."""
    return {
        f"optimizer.{number}.{name}": tensor
        for number, state in optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def reference_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a `Reference` by their names in a checkpoint."""
    return {f"reference.{name}": tensor for name, tensor in tensors.items()}


def read_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what state.json holds: progress, same and groups.

    Raises LorakitError if one of them is missing.
    """
    path = checkpoint.path / STATE_VALUES
    values = read_json(path)
    for name, kind in (("progress", dict), ("same", dict), ("groups", list)):
        if not isinstance(values.get(name), kind):
            raise LorakitError(f"{path} is damaged: {name} is missing; remove this checkpoint")
    return values


def restore(
    checkpoint: Checkpoint,
    values: Mapping[str, Any],
    restore_trained: Callable[[Path], None],
    optimizer: AdamW,
    divided: DividedWeights | None = None,
) -> None:
    """Set what is trained, by `restore_trained`, and the optimizer as they were.

    The optimizer takes the number of its steps from the checkpoint, and keeps its other settings.
    If it moves parts of `divided` weights, it takes its part of the state.

    Raises LorakitError if a file is damaged, or comes from another adapter.
    """
    tensors = read_tensors(checkpoint.path)
    restore_trained(checkpoint.path)
    try:
        _restore_optimizer(optimizer, tensors, values["groups"], divided)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise LorakitError(
            f"{checkpoint.path} is damaged ({type(error).__name__}: {error}); remove it"
        ) from None


def restore_adapter(path: Path, tensors: Mapping[str, LazyTensor], module: nn.Module) -> None:
    """Give the selected adapter of `module` the tensors of the checkpoint at `path`.

    Raises LorakitError if they are those of another adapter.
    """
    _fill(path, tensors, trained_tensors(module), "adapter.")


def restore_reference(path: Path, reference: Mapping[str, Tensor]) -> None:
    """Give the tensors of a `Reference` the values that the checkpoint at `path` holds.

    Raises LorakitError if they are missing, or those of another adapter.
    """
    tensors = read_tensors(path)
    if not any(name.startswith("reference.") for name in tensors):
        raise LorakitError(f"{path} is damaged: the reference of DPO is missing; remove it")
    _fill(path, tensors, reference_tensors(reference), "reference.")


def _fill(
    path: Path, tensors: Mapping[str, LazyTensor], own: Mapping[str, Tensor], start: str
) -> None:
    """Give `own` tensors the values of those whose names start so; both have the same names."""
    theirs = {name for name in tensors if name.startswith(start)}
    only_in_one = own.keys() ^ theirs
    if only_in_one:
        name = min(only_in_one)
        raise LorakitError(f"{path}: {name} is not in both, the run and the checkpoint")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensors[name].shape != tuple(tensor.shape):
                raise LorakitError(
                    f"{path}: {name} is {tensors[name].shape}, in this run {tuple(tensor.shape)}"
                )
            tensor.copy_(tensors[name].read())


def _restore_optimizer(
    optimizer: AdamW,
    tensors: Mapping[str, LazyTensor],
    saved_groups: list[Mapping[str, Any]],
    divided: DividedWeights | None,
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name in tensors:
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            number, _, part = rest.partition(".")
            found = tensors[name].read()
            if divided is not None:
                found = divided.own_state(params[int(number)], part, found)
            # a copy, because the tensor that is read is a view of the file
            state.setdefault(int(number), {})[part] = found.clone()
    groups = optimizer.state_dict()["param_groups"]
    for group, saved in zip(groups, saved_groups, strict=True):
        group["step"] = saved["step"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def group_values(optimizer: AdamW) -> list[dict[str, Any]]:
    """Return what each parameter group holds beside its parameters."""
    groups = optimizer.state_dict()["param_groups"]
    return [{name: v for name, v in group.items() if name != "params"} for group in groups]


def check_same(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise LorakitError if a run with settings `now` cannot go on from one with `saved`."""
    for name, value in now.items():
        before = saved.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and before != value:
            inner = next(key for key in {**before, **value} if before.get(key) != value.get(key))
            name, before, value = f"{name} {inner}", before.get(inner), value.get(inner)
        if before != value:
            raise LorakitError(
                f"resume: {checkpoint} was made with {name} {before!r}, this run has {value!r}; "
                "make them equal, or start in another output_dir"
            )
