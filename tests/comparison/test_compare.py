"""Whole comparisons of tiny models: what is written, resumed, skipped, refused and reported."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml

import lorakit as lk
from lorakit.comparison import work
from lorakit.comparison.record import fingerprint
from lorakit.comparison.rows import open_task
from lorakit.training import train as training

TIMES = ("tokens_per_second", "seconds", "peak_memory_mb")


def without_times(values):
    """The values of comparison.json but for those that no two runs share."""
    if isinstance(values, dict):
        return {k: without_times(v) for k, v in values.items() if k not in (*TIMES, "created")}
    if isinstance(values, list):
        return [without_times(each) for each in values]
    return values


def rules_without_seconds(values):
    """The recommendation without the rule that names seconds."""
    rules = values["recommendation"]["rules"]
    rules = [rule for rule in rules if not rule["rule"].endswith("the shortest training.")]
    return {**values, "recommendation": {**values["recommendation"], "rules": rules}}


def told(result):
    return rules_without_seconds(without_times(result.values))


def test_a_grid_of_two_models(grid, rows, tmp_path, models, capsys):
    result = lk.compare_models(grid)
    folder = tmp_path / "compared"
    values = json.loads((folder / "comparison.json").read_text())
    assert values == result.values
    assert lk.read_comparison(folder).values == values
    ids = [run["id"] for run in values["runs"]]
    assert ids == [
        "parity--bytes--untrained",
        "parity--bytes--default--s0",
        "parity--words--untrained",
        "parity--words--default--s0",
    ]
    assert {run["state"] for run in values["runs"]} == {"finished"}
    assert "run 2 of 4: parity--bytes--default--s0" in capsys.readouterr().out
    [task] = values["tasks"]
    assert sum(task["sizes"].values()) == 60
    # one run, and no seed to draw: the numbers are those of the library's own functions
    said = lk.read_completions(folder / "predictions" / f"{ids[1]}.jsonl")
    texts, references = ([c.prediction for c in said], [c.reference for c in said])
    row = task["rows"][1]
    expected = lk.bootstrap_interval(texts, references, "accuracy")
    assert row["scores"]["accuracy"] == {**expected._asdict(), "better": "higher"}
    model = lk.load_model(models["bytes"], dtype="float32")
    lk.load_adapter(model, folder / "runs" / ids[1])
    tok = lk.load_tokenizer(models["bytes"])
    measured = lk.evaluate(model, tok, folder / "data" / "parity" / "test.jsonl")
    # sums of fp32 losses in another order
    assert row["scores"]["perplexity"]["value"] == pytest.approx(measured["perplexity"], rel=1e-5)
    # a perplexity counts tokens, and these two models have other ones
    pairs = {(p["metric"], p["first"]["model"], p["second"]["model"]) for p in task["pairs"]}
    assert ("perplexity", "bytes", "bytes") in pairs
    assert ("perplexity", "bytes", "words") not in pairs
    assert ("bits_per_byte", "bytes", "words") in pairs
    assert values["recommendation"]["model"] in models
    page = (folder / "comparison.md").read_text()
    assert page.startswith("# comparison\n")
    assert "## Recommendation" in page


def test_all_models_see_the_rows_in_one_order(grid, monkeypatch):
    """The rows of every step, by their numbers, whatever the tokenizers make of them."""
    seen = []
    inner = training.Run

    class Watched(inner):
        def _prepare(self, number, log):
            seen[-1].append([list(rows) for rows in self.order.step(number)])
            return super()._prepare(number, log)

        def __init__(self, *args):
            seen.append([])
            super().__init__(*args)

    monkeypatch.setattr(training, "Run", Watched)
    lk.compare_models({**grid, "baseline": False})
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len({row for step in seen[0] for batch in step for row in batch}) > 16  # three steps


def test_settings_that_cut_rows_see_them_in_one_order_too(grid, monkeypatch):
    """Rows of 6 tokens at most, or of all: the runs say that their order is that of any length."""
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    grid["settings"] = {"short": {"max_seq_length": 8}, "long": {}}
    trained = []
    monkeypatch.setattr(
        work, "train", lambda *a, **k: trained.append(a[3]) or training.train(*a, **k)
    )
    result = lk.compare_models(grid)
    assert [config.group_by_length for config in trained] == [False, False]
    [note] = result.values["notes"]
    assert note.startswith("task parity: rows become other tokens, and so are cut: ")


def test_a_run_is_that_of_lorakit_train(grid, tmp_path):
    from lorakit.cli.main import main

    result = lk.compare_models({**grid, "baseline": False, "models": [grid["models"]["bytes"]]})
    folder = result.folder / "runs" / result.values["runs"][0]["id"]
    run_file = folder / "run.yaml"
    values = yaml.safe_load(run_file.read_text())
    assert values["data"]["train"] == str(result.folder / "data" / "parity" / "train.jsonl")
    assert main(["train", str(run_file), f"output_dir={tmp_path / 'alone'}"]) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (folder / name).read_bytes()


def test_a_comparison_that_is_stopped_goes_on(grid, tmp_path, monkeypatch):
    """Ctrl-C in a run, then in an evaluation: in the end the numbers are those without either."""
    grid |= {
        "models": {"bytes": grid["models"]["bytes"]},
        "settings": {"r2": {}, "r1": {"lora": {"r": 1}}},
    }
    whole = lk.compare_models({**grid, "output_dir": str(tmp_path / "whole")})
    taken = training.Run._step

    def interrupted(self, log):
        taken(self, log)
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Run, "_step", interrupted)
    stopped = lk.compare_models(grid)
    assert stopped.interrupted
    states = [run["state"] for run in stopped.values["runs"]]
    assert states == ["finished", "stopped", "waiting"]
    assert (stopped.folder / "runs" / "parity--bytes--r2--s0" / "checkpoint-2").is_dir()
    monkeypatch.setattr(training.Run, "_step", taken)
    completed = work.complete_rows

    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "complete_rows", killed)
    assert lk.compare_models(grid).interrupted
    monkeypatch.setattr(work, "complete_rows", completed)
    trained = []
    monkeypatch.setattr(work, "train", lambda *a, **k: trained.append(a) or training.train(*a, **k))
    ended = lk.compare_models(grid)
    assert len(trained) == 1  # the other run was trained before its evaluation was stopped
    assert told(ended) == told(whole)


def test_what_is_done_is_not_done_again(grid, tmp_path, monkeypatch, capsys):
    grid["baseline"] = False
    first = lk.compare_models(grid)
    with monkeypatch.context() as patched:
        for name in ("train", "load_model", "complete_rows"):
            patched.setattr(work, name, None)
        assert lk.compare_models(grid).values == first.values
        # a metric of texts is computed from those that are there
        grid["tasks"]["parity"]["metrics"] = ["exact_match"]
        again = lk.compare_models(grid)
        assert again.values["tasks"][0]["metrics"][0] == "exact_match"
    adapter = first.folder / "runs" / "parity--bytes--default--s0" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    grid["settings"] = {"default": {}, "r1": {"lora": {"r": 1}}}
    capsys.readouterr()
    wider = lk.compare_models(grid, only="--bytes--")
    assert "run 2 of 2: parity--bytes--r1--s0" in capsys.readouterr().out
    states = {run["id"]: run["state"] for run in wider.values["runs"]}
    assert states["parity--words--r1--s0"] == "waiting"
    assert adapter.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": {"max_steps": 2, "dtype": "float32"}}, "was made with lora.r 2, and now it is 8"),
        ({"tasks": {"parity": "fewer.jsonl"}}, "was changed after it was divided"),
    ],
)
def test_numbers_of_two_kinds_are_never_mixed(grid, rows, tmp_path, monkeypatch, change, message):
    grid |= {"baseline": False, "models": {"bytes": grid["models"]["bytes"]}}
    grid["base"]["max_steps"] = 2
    lk.compare_models(grid)
    monkeypatch.chdir(tmp_path)
    Path("fewer.jsonl").write_text("".join(rows.read_text().splitlines(True)[:50]))
    with pytest.raises(lk.LorakitError, match=message):
        lk.compare_models({**grid, **change})


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(grid, capsys):
    """A learning rate without bound diverges: ten steps are not finite."""
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    wild = {"learning_rate": 1e30, "max_steps": 14, "warmup_steps": 0}
    grid["settings"] = {"wild": wild, "tame": {}}
    result = lk.compare_models(grid)
    [(id, reason)] = result.failed.items()
    assert id == "parity--bytes--wild--s0"
    assert "not finite" in reason or "none of the" in reason
    assert [row["settings"] for row in result.values["tasks"][0]["rows"]] == ["tame"]
    assert f"{id} failed: " in str(result)
    assert result.values["recommendation"]["settings"] == "tame"


def test_a_run_that_cannot_fit_is_refused_before_its_model_is_loaded(grid, monkeypatch):
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    asked = []

    def refused(run, lengths, tok):
        asked.append((run.lora.r, len(lengths)))
        raise lk.LorakitError("the run needs more memory")

    monkeypatch.setattr(work, "check_run", refused)
    monkeypatch.setattr(work, "load_model", None)
    result = lk.compare_models(grid)
    assert list(result.failed.values()) == ["the run needs more memory"]
    assert asked == [(2, result.values["tasks"][0]["sizes"]["train"])]


def test_a_run_that_left_nothing_may_be_made_with_other_settings(grid):
    """One that failed before its first checkpoint, as it would again with the same settings."""
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    grid["base"]["lora"]["target_modules"] = ["nothing"]
    assert "matches no layer" in str(lk.compare_models(grid))
    del grid["base"]["lora"]["target_modules"]
    assert lk.compare_models(grid).failed == {}


def test_models_are_read_back_as_they_were_measured(grid):
    """Answers and losses of models that were trained in this process, and read from their files."""
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    grid["base"].pop("lora")
    grid["settings"] = {"adapter": {"lora": {"r": 2}}, "full": {"train": "full"}}
    first = lk.compare_models(grid)
    for path in (first.folder / "predictions").iterdir():
        path.unlink()
    again = lk.compare_models(grid)
    assert len(list((first.folder / "predictions").iterdir())) == 2
    assert again.values == first.values


def test_answers_that_are_cut_off_come_with_a_remedy(grid):
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    first = lk.compare_models(grid)
    [path] = (first.folder / "predictions").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 9])
    with pytest.raises(lk.LorakitError, match="line .* valid JSON.*: remove the file, and"):
        lk.compare_models(grid)
    path.write_bytes(b"".join(whole.splitlines(True)[:-1]))
    with pytest.raises(lk.LorakitError, match="remove it to complete them again"):
        lk.compare_models(grid)
    path.unlink()
    assert lk.compare_models(grid).values == first.values
    assert path.read_bytes() == whole


def test_a_row_that_cannot_be_completed_stops_a_run_before_it_trains(grid, rows, tmp_path):
    long = {"prompt": "long " * 40, "completion": " odd"}
    (tmp_path / "test.jsonl").write_text(json.dumps(long) + "\n")
    grid["tasks"]["parity"] = {"train": str(rows), "test": str(tmp_path / "test.jsonl")}
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    [reason] = lk.compare_models(grid).failed.values()
    assert "test.jsonl line 1: to score completions" in reason
    run = tmp_path / "compared" / "runs" / "parity--bytes--default--s0"
    assert not (run / "metrics.jsonl").exists()


def test_a_data_set_has_its_own_parts(grid, tmp_path, monkeypatch):
    """A directory that the library datasets reads: the rows to test on are those of its split."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "parity"
    folder.mkdir()
    for part, count in (("train", 6), ("test", 3)):
        lines = [
            json.dumps({"prompt": f"{part} {i} is", "completion": " odd"}) for i in range(count)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    task = {"train": str(folder), "test": str(folder), "kind": "classification"}
    config = lk.ComparisonConfig.from_dict({**grid, "tasks": {"parity": task}})
    rows = open_task(config, "parity")
    assert {part: len(found) for part, found in rows.parts.items()} == {"train": 6, "test": 3}
    assert {row.prompt.split()[0] for row in rows.parts["test"]} == {"test"}
    assert rows.notes == []


def test_a_text_has_no_answers(grid, tmp_path):
    """Rows of text are measured by their loss alone; files of their own are taken as they are."""
    lines = [json.dumps({"text": f"{i} and {i + 1}."}) + "\n" for i in range(12)]
    for name, part in (("train", lines[:8]), ("test", lines[6:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    task = {"train": "train.jsonl", "test": "test.jsonl", "kind": "text"}
    task = {k: str(tmp_path / v) if k != "kind" else v for k, v in task.items()}
    grid |= {"tasks": {"sums": task}, "models": {"bytes": grid["models"]["bytes"]}}
    values = lk.compare_models(grid).values
    [found] = values["tasks"]
    assert found["metrics"] == ["bits_per_byte", "perplexity"]
    assert found["sizes"] == {"train": 8, "test": 6}
    assert values["notes"] == [
        "task sums: 2 of its rows to train on are test rows too, so scores are high"
    ]
    scores = found["rows"][0]["scores"]
    assert scores["bits_per_byte"]["better"] == "lower"
    assert not (tmp_path / "compared" / "predictions").exists()


def test_scores_of_meaning_and_of_files(grid, tmp_path, monkeypatch):
    """BERTScore over the first model's hidden states, and GGUF files with lorakit's own decode."""
    from lorakit.export import runtime

    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False, "exports": ["q8_0"]}
    grid["tasks"]["parity"] |= {"metrics": ["bert_score", "accuracy"]}
    before = {f"{fingerprint(grid['models']['bytes'])} q8_0": {"error": "the disk is full"}}
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "exports.json").write_text(json.dumps(before))
    result = lk.compare_models(grid)
    [row] = result.values["tasks"][0]["rows"]
    said = lk.read_completions(result.folder / "predictions" / f"{row['run ids'][0]}.jsonl")
    model = lk.load_model(grid["models"]["bytes"], dtype="float32")
    tok = lk.load_tokenizer(grid["models"]["bytes"])
    texts = [c.prediction for c in said], [c.reference for c in said]
    expected = lk.bert_score(model, tok, *texts).f1.double().mean().item()
    assert row["scores"]["bert_score"]["value"] == pytest.approx(expected, abs=1e-6)
    exported = row["export"]["q8_0"]
    assert exported.get("measured_by") == "lorakit", exported
    assert exported["tokens_per_second"] > 0
    run = result.folder / "runs" / row["run ids"][0]
    file = tmp_path / "model.gguf"
    written = lk.export_gguf(grid["models"]["bytes"], file, quantization="q8_0", adapter=run)
    assert exported["bytes"] == written.size == file.stat().st_size
    assert not list(result.folder.glob(".export-*"))
    assert "Exported models" in str(result)


def test_hostile_names(grid, tmp_path):
    """Names go into folders, tables and pages; none of them leaves its place."""
    hostile = "../../x <img src=x onerror=alert(1)>|`"
    grid["tasks"] = {hostile: grid["tasks"]["parity"]}
    grid |= {"models": {hostile: grid["models"]["bytes"]}, "settings": {hostile: {}}}
    result = lk.compare_models({**grid, "baseline": False})
    [run] = result.values["runs"]
    assert run["task"] == run["model"] == run["settings"] == hostile
    folder = (result.folder / run["folder"]).resolve()
    assert folder.parent == (tmp_path / "compared" / "runs").resolve()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compared", "rows.jsonl"]
    page = (result.folder / "comparison.md").read_text()
    assert "<img" not in page
    assert "\\|\\`" in page


def test_another_process_works_there(grid, tmp_path):
    from lorakit.training.state import only_run_in

    folder = tmp_path / "compared"
    folder.mkdir()
    with only_run_in(folder), pytest.raises(lk.LorakitError, match="another run is training into"):
        lk.compare_models(grid)
    shutil.rmtree(folder)
    with pytest.raises(lk.LorakitError, match="no run has 'nothing' in its id"):
        lk.compare_models(grid, only="nothing")
    assert not folder.exists()


def test_a_damaged_comparison_is_refused(tmp_path):
    with pytest.raises(lk.LorakitError, match="comparison.json does not exist"):
        lk.read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"version": 2}')
    with pytest.raises(lk.LorakitError, match="is no comparison, or one of another version"):
        lk.read_comparison(tmp_path)
    (tmp_path / "comparison.json").write_text('{"version": 1, "tasks": [{}], "runs": []}')
    with pytest.raises(lk.LorakitError, match="comparison.json is damaged: call compare with"):
        lk.read_comparison(tmp_path)


def test_a_damaged_comparison_is_written_again(grid, tmp_path):
    """The runs know all of it; only the time of the first call is lost."""
    grid["models"] = {"bytes": grid["models"]["bytes"]}
    first = lk.compare_models(grid, only="untrained")
    path = tmp_path / "compared" / "comparison.json"
    path.write_text(path.read_text()[:99])
    again = lk.compare_models(grid, only="untrained")
    assert without_times(again.values) == without_times(first.values)
    assert json.loads(path.read_text()) == again.values


def test_empty_answers_are_left_out_before_rows_are_divided(grid, rows):
    with rows.open("a") as file:
        file.write('{"prompt": "61 is", "completion": ""}\n')
    with pytest.raises(lk.LorakitError, match="set skip_empty to leave such rows out"):
        lk.plan_comparison(grid)
    grid["base"]["skip_empty"] = True
    assert sum(lk.plan_comparison(grid)[0].sizes.values()) == 60


def test_bad_answers_measure_no_model(grid, rows):
    """KTO learns from them; as references they would praise the model that gives them."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    judged = [{**line, "label": i % 3 != 0} for i, line in enumerate(lines)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in judged))
    grid |= {"models": {"bytes": grid["models"]["bytes"]}, "baseline": False}
    grid["base"] |= {"objective": "kto", "max_steps": 1}
    result = lk.compare_models(grid)
    assert result.failed == {}
    data = result.folder / "data" / "parity"
    tested, trained = (lk.read_rows(data / f"{part}.jsonl") for part in ("test", "train"))
    assert {row.desirable for row in tested} == {True}
    assert {row.desirable for row in trained} == {True, False}
    assert lk.compare_models(grid).values == result.values
    rows.write_text("".join(json.dumps({**line, "label": False}) + "\n" for line in lines))
    with pytest.raises(lk.LorakitError, match="every row to test with has a bad answer"):
        lk.compare_models(grid)


def test_prompts_without_answers_measure_no_model(grid, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "say {i}"}}\n' for i in range(40)))
    grid["tasks"] = {"prompts": {"data": str(path)}}
    with pytest.raises(lk.LorakitError, match=r"prompts: .* has no answer to measure models by"):
        lk.plan_comparison(grid)


def test_a_model_that_was_trained_in_place_has_another_fingerprint(tmp_path):
    """Its embeddings, at the beginning of the file, may be those of before."""
    path = tmp_path / "model.safetensors"
    weights = np.zeros(3 << 20, dtype=np.uint8)
    path.write_bytes(weights.tobytes())
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    weights[1 << 21 :] = 1
    path.write_bytes(weights.tobytes())
    assert fingerprint(str(tmp_path)) != before
