"""`lorakit compare` as a user meets it: what it prints, asks, writes and returns."""

import io
import json
import signal

import pytest
import yaml

import lorakit as lk
from lorakit.cli.main import main
from lorakit.training import train as training
from tests.conftest import ROWS


@pytest.fixture
def compare_file(tiny_dir, tmp_path):
    """A comparison of one model with two settings on one task of 60 rows."""
    lines = [{**row, "prompt": f"{i}. {row['prompt']}"} for i in range(3) for row in ROWS[:20]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "models": {"tiny": str(tiny_dir)},
        "tasks": {"sums": {"data": str(tmp_path / "rows.jsonl"), "metrics": ["exact_match"]}},
        "output_dir": str(tmp_path / "compared"),
        "base": {"max_steps": 2, "dtype": "float32", "learning_rate": 1e-2},
        "settings": {"r2": {"lora": {"r": 2}}, "r4": {"lora": {"r": 4}}},
        "baseline": False,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_comparison_from_its_file_to_votes(compare_file, tmp_path, capsys, monkeypatch):
    assert main(["compare", str(compare_file), "base.max_steps=1"]) == 0
    out = capsys.readouterr().out
    assert "run 2 of 2: sums--tiny--r4--s0" in out
    assert "Recommendation" in out
    folder = tmp_path / "compared"
    assert out.endswith(f"comparison.json, comparison.md and the runs in {folder}\n")
    assert main(["compare", str(folder)]) == 0
    assert capsys.readouterr().out.strip() in out

    runs = [f"sums--tiny--{name}--s0" for name in ("r2", "r4")]
    for side, name in enumerate(runs):  # answers that differ, one with a command to a terminal
        path = folder / "predictions" / f"{name}.jsonl"
        texts = [c._replace(prediction=f"{side}\x1b[31m") for c in lk.read_completions(path)]
        lk.write_completions(path, texts)
    monkeypatch.setattr("sys.stdin", io.StringIO("1\nx\n0\nq\n"))
    assert main(["compare", str(folder), "--vote", *runs]) == 0
    out = capsys.readouterr().out
    assert "'x' is none of 1, 2, 0 and q" in out
    assert "\x1b" not in out
    assert "\\x1b[31m" in out
    assert "tiny" not in out.partition("first ")[0]  # whose answer it is
    share = lk.Ballot(folder, *runs).share()
    assert (share.votes, share.ties) == (2, 1)
    assert out.splitlines()[-1] == str(share)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["compare", str(folder), "--vote", *runs]) == 0  # the end of a file is a q


def test_a_dry_run_writes_nothing(compare_file, tmp_path, capsys, forecasts):
    assert main(["compare", str(compare_file), "--dry-run", "seeds=[0,1]"]) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("run 1 of 4: sums--tiny--r2--s0 (waiting; rows: ")
    assert second.partition("), memory ")[2] == first.partition("), memory ")[2]
    assert len(others) == 2
    assert len(forecasts) == 2  # one for each settings
    assert main(["compare", str(compare_file), "--dry-run", "--only", "r4"]) == 0
    assert capsys.readouterr().out.startswith("run 1 of 1: sums--tiny--r4--s0 ")
    assert not (tmp_path / "compared").exists()


def test_exit_codes(compare_file, capsys, monkeypatch):
    taken = training.Run._step

    def interrupted(self, log):
        taken(self, log)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Run, "_step", interrupted)
    assert main(["compare", str(compare_file)]) == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err

    def diverged(self, log):
        raise lk.LorakitError("nothing was finite")

    monkeypatch.setattr(training.Run, "_step", diverged)
    assert main(["compare", str(compare_file)]) == 1
    assert "sums--tiny--r4--s0 failed: nothing was finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere.yaml"], "/nowhere.yaml does not exist"),
        (["FILE", "nmae=1"], "unknown key 'nmae' (did you mean 'name'?)"),
        (["FILE", "base.model=x"], "base: model is not for a comparison"),
        (["FILE", "exports=[q4]"], "exports: 'q4' is not f32, f16"),
        (["FILE", "tasks.sums.data=/nowhere.jsonl"], "task sums: /nowhere.jsonl does not exist"),
        (["FILE", "models.tiny=/nowhere"], "/nowhere does not exist"),
        (["FILE", "tasks.sums.metrics=[bert]"], "did you mean 'bert_score'"),
        (["FILE", "--only", "x/y"], "no run has 'x/y' in its id"),
        (["FILE", "--only", "x/y", "--dry-run"], "no run has 'x/y' in its id"),
        (["FILE", "--vote", "a", "b"], "is no directory; name that of a comparison"),
        (["DIR"], "comparison.json does not exist"),
    ],
)
def test_an_error_is_one_sentence(compare_file, tmp_path, capsys, arguments, message):
    places = {"FILE": str(compare_file), "DIR": str(tmp_path)}
    assert main(["compare", *(places.get(each, each) for each in arguments)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("lorakit: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "compared").exists()


def test_rows_that_are_broken_or_too_few(compare_file, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    whole = rows.read_text()
    rows.write_text(whole + '{"prompt": "no more"}\n')
    assert main(["compare", str(compare_file)]) == 1
    assert "task sums: " in (err := capsys.readouterr().err)
    assert "rows.jsonl line 61" in err
    rows.write_text("".join(whole.splitlines(True)[:3]))
    assert main(["compare", str(compare_file)]) == 1
    assert "3 rows" in (err := capsys.readouterr().err)
    assert "it takes more rows, or files of their own" in err
