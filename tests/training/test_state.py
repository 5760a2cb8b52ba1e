"""Checkpoints are whole or absent, and one run at a time writes them."""

import contextlib

import pytest

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
