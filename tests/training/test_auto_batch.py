"""Rows at a time that are "auto": the rows of a step stay, and a resumed run has the same split."""

import json

import pytest

import lorakit as lk
from lorakit.training import auto_batch
from lorakit.training.ranks import Ranks
from tests.conftest import ROWS
from tests.training.memory_plan.arithmetic import counted_forecasts
from tests.training.runs import ADAPTER, run

AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 1, "max_steps": 2}


def lines_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("auto")]


def test_a_small_run_takes_all_rows_of_a_step_at_a_time(tiny_dir, tok, tmp_path, capsys):
    """The adapter has the bytes of a run whose settings say so, without any forecast."""
    run(tiny_dir, tok, tmp_path / "auto", **AUTO)
    assert lines_of(capsys) == ["auto: 8 rows at a time, 1 times a step, which is all of them"]
    given = {"per_device_train_batch_size": 8, "max_steps": 2}
    run(tiny_dir, tok, tmp_path / "given", **given)
    assert (tmp_path / "auto" / ADAPTER).read_bytes() == (tmp_path / "given" / ADAPTER).read_bytes()


def test_rows_are_split_as_the_memory_says_and_the_checkpoint_keeps_it(
    tiny_dir, tok, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(auto_batch, "surely_fits", lambda run, memory: False)
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 10**6)
    monkeypatch.setattr(auto_batch, "rows_that_fit", lambda run, memory: 4)
    options = {**AUTO, "gradient_accumulation_steps": "auto", "save_steps": 1}
    run(tiny_dir, tok, tmp_path / "out", **{**options, "max_steps": 1})
    rows, begin = 4, "auto: 4 rows at a time, 2 times a step"
    assert lines_of(capsys) == [f"{begin}, which is what fits into 1.0 MB"]
    saved = json.loads((tmp_path / "out" / "checkpoint-1" / "state.json").read_text())["same"]
    assert saved["per_device_train_batch_size"] == rows
    assert saved["gradient_accumulation_steps"] == 8 // rows
    monkeypatch.setattr(auto_batch, "rows_that_fit", lambda run, memory: 8)  # another machine
    _, resumed = run(tiny_dir, tok, tmp_path / "out", **options, resume="auto")
    assert lines_of(capsys) == [f"{begin}, as the checkpoint says"]
    assert resumed.steps == 2
    given = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
    _, plain = run(tiny_dir, tok, tmp_path / "plain", **given, max_steps=2)
    assert plain.tokens == resumed.tokens
    names = [tmp_path / name / ADAPTER for name in ("out", "plain")]
    assert names[0].read_bytes() == names[1].read_bytes()
    other = {**options, "per_device_train_batch_size": 6, "max_steps": 3, "resume": "auto"}
    with pytest.raises(lk.LorakitError, match="4 rows at a time do not divide 6 of a step"):
        run(tiny_dir, tok, tmp_path / "out", **other)


def test_processes_of_one_machine_share_its_memory(tiny_dir, tok, tmp_path, monkeypatch):
    """Two of four processes are on this machine, and the others have memory of their own."""
    free, model = [], lk.attach(lk.load_model(tiny_dir), lk.LoraConfig(r=4))
    ranks = Ranks()
    ranks.size, ranks.on_machine = 4, 2
    monkeypatch.setattr(auto_batch, "free_memory", lambda device: 10**6)
    monkeypatch.setattr(auto_batch, "surely_fits", lambda run, memory: free.append(memory) or True)
    examples = lk.encode_rows(ROWS, tok, max_seq_length=64)
    config = lk.TrainConfig(output_dir=str(tmp_path), **AUTO)
    auto_batch.with_split(model, examples, config, ranks)
    assert free == [10**6 // 2]


def test_without_a_forecast_a_run_takes_its_rows_one_by_one(
    tiny_dir, tok, tmp_path, capsys, monkeypatch
):
    def fails(*_):
        raise lk.LorakitError("no such thing")

    monkeypatch.setattr(auto_batch, "surely_fits", fails)
    _, done = run(tiny_dir, tok, tmp_path / "out", **{**AUTO, "max_steps": 1})
    why = "since there is no forecast of memory (no such thing)"
    assert lines_of(capsys) == [f"auto: 1 rows at a time, 8 times a step, {why}"]
    assert done.steps == 1
    monkeypatch.setattr(auto_batch, "surely_fits", lambda run, memory: False)
    counted_forecasts(monkeypatch)
    monkeypatch.setattr(auto_batch, "rows_that_fit", lambda run, memory: 0)
    run(tiny_dir, tok, tmp_path / "full", **{**AUTO, "max_steps": 1})
    [line] = lines_of(capsys)
    assert line.endswith("although the forecast is that not even one row fits")


@pytest.mark.parametrize(
    ("rows", "steps", "of_step"),
    [("auto", 1, 8), ("auto", 4, 32), (6, "auto", 6), ("auto", "auto", 8), (3, 2, 6)],
)
def test_the_rows_of_a_step_do_not_depend_on_memory(rows, steps, of_step):
    config = lk.TrainConfig(per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    assert config.rows_of_step == of_step
    assert config.splits_itself == ("auto" in (rows, steps))
    for part in (n for n in range(1, of_step + 1) if of_step % n == 0):
        split = config.split(part)
        assert (split.rows_at_a_time, split.batches_of_step) == (part, of_step // part)
        assert split.rows_of_step == of_step
        assert not split.splits_itself
    with pytest.raises(lk.LorakitError, match=f"do not divide {of_step} of a step"):
        config.split(of_step + 1)
    if config.splits_itself:
        for name in ("rows_at_a_time", "batches_of_step"):
            with pytest.raises(lk.LorakitError, match="is auto, which only a training run settles"):
                getattr(config, name)
