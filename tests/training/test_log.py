"""What a run writes down, also on a full disk and after a crash."""

import contextlib
import json

import pytest

import lorakit as lk
from lorakit.training import state as run_state
from tests.conftest import ROWS
from tests.training.runs import (
    ADAPTER,
    adapted,
    run,
    small_files,
)


def test_a_damaged_log_does_not_stop_a_run(tiny_dir, tok, tmp_path):
    run(tiny_dir, tok, tmp_path, max_steps=2, save_steps=2)
    log = tmp_path / "metrics.jsonl"
    garbage = b"garbage\n[]\n" + b"[" * 10**5 + b'\n{"step": "x"}\n\xff\n{"step": 1'
    log.write_bytes(log.read_bytes() + garbage)
    run(tiny_dir, tok, tmp_path, max_steps=3, resume="auto")
    assert [json.loads(line)["step"] for line in log.open()] == [1, 2, 3]


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_32bit"])
def test_a_full_disk_costs_a_checkpoint_and_lines_of_the_log(
    tiny_dir, tok, tmp_path, capsys, optim
):
    """Full from the first step to the fourth: no file may grow over 300 bytes."""
    model, done = adapted(tiny_dir), []
    limit = contextlib.ExitStack()

    def after_step():
        done.append(1)
        if len(done) == 1:
            limit.enter_context(small_files(300))
        if len(done) == 4:
            limit.close()

    config = lk.TrainConfig(str(tmp_path), max_steps=6, save_steps=3, optim=optim)
    with limit:
        result = lk.train(model, tok, ROWS, config, after_step=after_step)
    assert result.steps == 6
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl could not be written ") == 1
    assert out.count("the checkpoint of step 3 could not be written") == 1
    assert [each.step for each in run_state.checkpoints(tmp_path)] == [6]
    assert (tmp_path / ADAPTER).exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 5, 6]
