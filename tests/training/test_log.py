"""What a run writes down, also on a full disk and after a crash."""

import contextlib
import json

import pytest

import lorakit as lk
from lorakit.training import state as run_state
from tests.conftest import ROWS
from tests.training.runs import (
    ADAPTER,
    JUDGED,
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


def test_samples_are_the_models_own_completions_of_the_first_rows(tiny_dir, tok, tmp_path):
    options = {"max_steps": 4, "eval_steps": 2, "eval_samples": 3, "save_steps": 2}
    data = {"train": ROWS, "validation": ROWS[:5]}
    model, _ = run(tiny_dir, tok, tmp_path / "a", data, **options)
    text = (tmp_path / "a" / "samples.jsonl").read_text()
    samples = [json.loads(line) for line in text.splitlines()]
    assert [(s["step"], s["row"]) for s in samples] == [(t, r) for t in (2, 4) for r in range(3)]
    for sample, (prompt, reference, prediction) in zip(
        samples[3:], lk.complete_rows(model, tok, ROWS[:3]), strict=True
    ):
        found = sample["prompt"], sample["reference"], sample["completion"]
        assert found == (prompt, reference, prediction)
    # with a metric, which completes all rows, the samples are the same
    run(tiny_dir, tok, tmp_path / "b", data, eval_metrics=["exact_match"], **options)
    assert (tmp_path / "b" / "samples.jsonl").read_text() == text


def test_a_sample_of_kto_says_whether_its_reference_is_a_good_answer(tiny_dir, tok, tmp_path):
    options = {"max_steps": 1, "eval_steps": 1, "eval_samples": 4, "objective": "kto"}
    run(tiny_dir, tok, tmp_path, {"train": JUDGED, "validation": JUDGED[:5]}, **options)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [row["label"] for row in JUDGED[:4]]


def test_a_resumed_run_has_the_samples_of_one_that_was_not_stopped(tiny_dir, tok, tmp_path):
    options = {"max_steps": 6, "eval_steps": 2, "eval_samples": 2, "save_steps": 3}
    data = {"train": ROWS, "validation": ROWS[:5]}
    run(tiny_dir, tok, tmp_path / "whole", data, **options)
    model, done = adapted(tiny_dir), []

    def fail():
        done.append(1)
        if len(done) == 5:  # after the evaluation of step 4, and before the checkpoint of step 6
            raise KeyboardInterrupt

    config = lk.TrainConfig(str(tmp_path / "part"), learning_rate=1e-2, **options)
    with pytest.raises(KeyboardInterrupt):
        lk.train(model, tok, data, config, after_step=fail)
    assert (tmp_path / "part" / "samples.jsonl").read_text().count("\n") == 4
    run(tiny_dir, tok, tmp_path / "part", data, **options, resume="auto")
    whole, part = (tmp_path / name / "samples.jsonl" for name in ("whole", "part"))
    assert part.read_bytes() == whole.read_bytes()


def test_samples_need_rows_that_can_be_completed(tiny_dir, tok, tmp_path):
    for data, said in [
        (ROWS, "eval_samples needs validation rows"),
        ({"train": ROWS, "validation": [{"text": "abc"}]}, "plain text has no completion to score"),
    ]:
        with pytest.raises(lk.LorakitError, match=said):
            run(tiny_dir, tok, tmp_path, data, eval_samples=1)
    with pytest.raises(lk.LorakitError, match="eval_samples must be 0 or more, not -1"):
        lk.TrainConfig(eval_samples=-1)
