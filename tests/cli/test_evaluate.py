"""`lorakit evaluate`: what it prints is what the API returns."""

import json

import pytest

import lorakit as lk
from lorakit.cli import main
from tests.conftest import ROWS


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_loss_scores_and_a_comparison(tiny_dir, rows, tmp_path, capsys):
    adapter, saved = tmp_path / "adapter", tmp_path / "new" / "said.jsonl"
    model, tok = lk.load_model(tiny_dir, dtype="float32"), lk.load_tokenizer(tiny_dir)
    wide = {"r": 4, "lora_alpha": 64, "init_lora_weights": False}
    lk.save_adapter(lk.attach(model, lk.LoraConfig(**wide)), adapter)
    command = ["evaluate", str(tiny_dir), str(rows), "--dtype", "float32"]
    scored = [*command, "--metrics", "exact_match,rouge_l", "--json"]
    assert main([*scored, "--save", str(saved)]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*scored, "--adapter", str(adapter), "--compare", str(saved)]) == 0
    adapted = json.loads(capsys.readouterr().out)

    said = lk.complete_rows(model, tok, rows)
    texts, references = [[each[i] for each in said] for i in (2, 1)]
    loss = lk.evaluate(model, tok, rows)
    assert {name: adapted[name] for name in loss} == loss
    assert adapted["rouge_l"] == list(lk.bootstrap_interval(texts, references, "rouge_l"))
    before = lk.read_completions(saved)
    assert [each.prompt for each in before] == [row["prompt"] for row in ROWS]
    assert adapted["compared"]["rouge_l"] == json.loads(
        json.dumps(
            lk.compare_predictions([c.prediction for c in before], texts, references, "rouge_l")
        )
    )
    with lk.disable_adapters(model):
        assert lk.complete_rows(model, tok, rows) == before
        assert plain["loss"] == lk.evaluate(model, tok, rows)["loss"] != adapted["loss"]

    assert main([*scored[:-1], "--compare", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*loss, *["exact_match", "rouge_l"] * 2]
    assert lines[-1].endswith("p = 1: the difference is within noise")


def test_tasks_come_beside_the_loss_of_rows(tiny_dir, rows, monkeypatch, capsys):
    """What runs them has tests of its own; here are its arguments, and the table."""
    asked = []

    def evaluate_tasks(model, tok, tasks, **options):
        asked.append((tasks, options))
        return {"mine": {"acc,none": 0.25, "sample_len": 4}}

    monkeypatch.setattr(lk, "evaluate_tasks", evaluate_tasks)
    options = ["--tasks", "mine, other", "--limit", "4", "--num-fewshot", "2", "--chat"]
    assert main(["evaluate", str(tiny_dir), *options, "--dtype", "float32", str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "loss"
    assert [line.split() for line in lines[6:]] == [
        ["mine", "acc,none", "0.2500"],
        ["mine", "sample_len", "4.0000"],
    ]
    [(tasks, found)] = asked
    assert tasks == ["mine", "other"]
    expected = {"num_fewshot": 2, "limit": 4, "batch_size": 8, "chat": True, "tasks_dir": None}
    assert found == expected


def test_a_judge_sees_both_models_answers(tiny_dir, rows, tmp_path, monkeypatch, capsys):
    """What asks the endpoint has tests of its own; here is what it is given, and the table."""
    saved, asked = tmp_path / "said.jsonl", []
    said = [lk.Completion(row["prompt"], row["completion"], "no") for row in ROWS]
    lk.write_completions(saved, said)

    def judge_answers(prompts, first, second, **options):
        asked.append((prompts, first, options))
        return lk.Judgement(["second", "second", "tie", "none"], 7)

    monkeypatch.setattr(lk, "judge_answers", judge_answers)
    options = ["--compare", str(saved), "--judge", "http://x/v1", "--judge-model", "j"]
    options += ["--judge-calls", "9", "--judge-key", "k"]
    assert main(["evaluate", str(tiny_dir), str(rows), "--dtype", "float32", *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[6:]]
    assert [line[1:] for line in lines] == [
        ["win_rate", "0.8333"],
        ["wins", "2"],
        ["losses", "0"],
        ["ties", "1"],
        ["not_judged", "1"],
        ["p_value", "0.5"],
        ["calls", "7"],
    ]
    monkeypatch.setattr(lk, "judge_answers", lambda *_, **__: lk.Judgement(["none"], 0))
    assert main(["evaluate", str(tiny_dir), str(rows), "--dtype", "float32", *options]) == 0
    assert "win_rate       of nothing\n" in capsys.readouterr().out
    [(prompts, first, found)] = asked
    assert (prompts, first) == ([row["prompt"] for row in ROWS], ["no"] * len(ROWS))
    assert found == {
        "references": [row["completion"] for row in ROWS],
        "endpoint": "http://x/v1",
        "judge": "j",
        "api_key": "k",
        "max_calls": 9,
    }


def test_classes_from_the_run_file_to_the_merged_model(tiny_dir, tmp_path, capsys):
    """Trained, evaluated with the adapter and merged; each says what Python does."""
    rows, run_file = tmp_path / "rows.csv", tmp_path / "run.yaml"
    lines = [f"{a} and {b},{'even' if (a + b) % 2 == 0 else 'odd'}" for a in range(4)
             for b in range(4)]  # fmt: skip
    rows.write_text("question,label\n" + "\n".join(lines) + "\n")
    run = {"model": str(tiny_dir), "objective": "classification", "output_dir": f"{tmp_path}/out",
           "data": {"train": str(rows), "columns": {"text": "question"}}, "max_steps": 3,
           "dtype": "float32"}  # fmt: skip
    run_file.write_text(json.dumps(run))
    assert main(["train", str(run_file)]) == 0
    assert "16 rows of the classes even, odd" in capsys.readouterr().out
    rows.write_text(rows.read_text().replace("question", "text"))
    command = ["evaluate", str(tiny_dir), str(rows), "--dtype", "float32", "--json"]
    assert main([*command, "--adapter", f"{tmp_path}/out"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"loss", "accuracy", "macro_f1", "rows"}
    merged = str(tmp_path / "merged")
    assert main(["merge", str(tiny_dir), f"{tmp_path}/out", merged, "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert main(["evaluate", merged, str(rows), "--dtype", "float32", "--json"]) == 0
    # merged products round otherwise than those of the adapter
    assert json.loads(capsys.readouterr().out) == pytest.approx(found, rel=1e-5)
    for wrong, said in {
        ("evaluate", merged, str(rows), "--metrics", "accuracy"): "--metrics is about texts",
        ("generate", merged, "hi", "--max-new-tokens", "2"): "it tells no next token",
        ("generate", str(tiny_dir), "hi", "--adapter", f"{tmp_path}/out"): "a head for classes",
        ("export", merged, f"{tmp_path}/m.gguf"): "it tells no next token",
        ("train", str(run_file), f"output_dir={tmp_path}/2", "labels=[even]"): "names one class",
        ("train", str(run_file), f"output_dir={tmp_path}/2", "objective=sft", "labels=[a, b]"):
            "labels goes with objective classification",
    }.items():  # fmt: skip
        assert main(list(wrong)) == 1
        assert said in capsys.readouterr().err


def test_what_is_refused(tiny_dir, rows, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    lk.write_completions(other, [lk.Completion("a", "b\u2028", "c")])
    assert lk.read_completions(other) == [("a", "b\u2028", "c")]
    command = ["evaluate", str(tiny_dir), str(rows)]
    scored = [*command, "--metrics", "exact_match"]
    for arguments, message in [
        ([*command, "--save", "x"], "--save and --compare are about completions: give --metrics"),
        ([*command, "--metrics", "exact"], "unknown metric 'exact' (did you mean 'exact_match'"),
        ([*scored, "--compare", str(other)], f"--compare {other}: it holds completions of other"),
        ([*scored, "--compare", str(rows)], "line 1: a completion has a text as reference and"),
        ([*command, "--train-on", "x"], "train_on"),
        ([*scored, "--save", str(rows)], f"--save {rows} would replace the rows"),
        (
            [*scored, "--save", str(other), "--compare", str(other)],
            f"--save {other} would replace --compare",
        ),
        ([*scored, "--save", str(tmp_path)], f"--save {tmp_path} is a directory; name a file"),
        (
            [*scored, "--compare", str(other), "--judge", "x", "--judge-model", "j"],
            "--judge x: it must begin with http:// or https://",
        ),
        ([*command, "--judge", "http://x/v1"], "--judge compares two models: give --compare"),
        (command[:2], "there is nothing to evaluate: give a file of rows, or --tasks"),
        (
            [*command[:2], "--tasks", "a", "--metrics", "bleu"],
            "--metrics and --judge are about rows",
        ),
    ]:
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_a_head_of_one_output_says_what_it_is_taken_for(tiny_dir, tmp_path, capsys):
    lk.save_model(
        lk.load_model(tiny_dir, dtype="float32", classifier=lk.ClassifierConfig()), tmp_path / "m"
    )
    lk.load_tokenizer(tiny_dir).save(tmp_path / "m")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "numbers.jsonl").write_text(
        '{"text": "a", "label": 0.5}\n{"text": "b", "label": 2}\n'
    )
    assert main(["evaluate", str(tmp_path / "m"), str(tmp_path / "pairs.jsonl")]) == 0
    said = capsys.readouterr()
    assert "is taken for that of a reward model" in said.err
    assert "preference_accuracy" in said.out
    command = ["evaluate", str(tmp_path / "m"), str(tmp_path / "numbers.jsonl")]
    assert main([*command, "--format", "classification"]) == 0
    assert "mean_absolute_error" in capsys.readouterr().out
