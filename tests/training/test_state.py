"""Checkpoints are whole or absent, and one run at a time writes them."""

import contextlib
import json
import os
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.training import state as run_state
from tests.training.runs import (
    ADAPTER,
    adapted,
    run,
    small_files,
)


def test_a_full_disk_leaves_the_earlier_checkpoint(tiny_dir, tok, tmp_path, monkeypatch, capsys):
    """Step 4's cannot be written, the others can; the run goes on and ends well."""
    real = run_state.write_checkpoint

    def sometimes(output_dir, step, *rest):
        with small_files(3000) if step == 4 else contextlib.nullcontext():
            return real(output_dir, step, *rest)

    monkeypatch.setattr(run_state, "write_checkpoint", sometimes)
    _, result = run(tiny_dir, tok, tmp_path, max_steps=5, save_steps=2)
    assert result.steps == 5
    out = capsys.readouterr().out
    assert "checkpoint of step 4 could not be written (" in out
    assert "File too large" in out
    assert [each.step for each in run_state.checkpoints(tmp_path)] == [2, 5]
    assert not list(tmp_path.glob(".checkpoint*"))
    assert (tmp_path / ADAPTER).exists()


def test_a_full_disk_at_the_end_is_one_line(tiny_dir, tmp_path):
    model = adapted(tiny_dir)
    with small_files(3000), pytest.raises(OSError, match="File too large"):
        lk.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / ADAPTER).exists()


def test_one_run_at_a_time(tiny_dir, tok, tmp_path):
    with (
        run_state.only_run_in(tmp_path),
        pytest.raises(lk.LorakitError, match="another run is training into"),
    ):
        run(tiny_dir, tok, tmp_path)
    run(tiny_dir, tok, tmp_path)


@pytest.mark.parametrize("calls", range(9))
def test_a_kill_at_any_moment_leaves_a_whole_state(calls, tmp_path):
    """A process ends without a word before its n-th change of the disk: a state is there, whole."""
    path, old, new = tmp_path / "state", {"at": 1}, {"at": 2}

    def save(to):
        (to / "adapter").write_text(str(to))

    run_state.write_whole(path, {"a": torch.zeros(3)}, old, save)
    child = os.fork()
    if child == 0:
        left = iter(range(calls, -1, -1))
        try:
            with contextlib.ExitStack() as stack:
                for name in ("os.rename", "os.mkdir", "os.fsync", "os.unlink", "os.rmdir"):
                    stack.enter_context(mock.patch(name, _dying(name, left)))
                run_state.write_whole(path, {"a": torch.ones(3)}, new, save)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    run_state.recover(path)
    values = json.loads((path / run_state.STATE_VALUES).read_text())
    assert values in (old, new)
    [a] = load_file(path / run_state.STATE_TENSORS).values()
    assert torch.equal(a, torch.full((3,), float(values["at"] - 1)))
    run_state.write_whole(path, {"a": torch.ones(3)}, new, save)  # and goes on
    assert [each.name for each in tmp_path.iterdir()] == ["state"]


def _dying(name, left):
    """Return a function of os that ends the process when `left` has come to 0."""
    function = getattr(os, name.removeprefix("os."))

    def call(*args, **options):
        if next(left) == 0:
            os._exit(0)
        return function(*args, **options)

    return call
