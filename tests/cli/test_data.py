"""`lorakit data`: what its actions print, on any terminal, and the files that they write."""

import json
import os
import signal
import subprocess
import sys

import pytest

import lorakit as lk
from lorakit.cli.main import main
from lorakit.data.inspect import PLAIN
from tests.data.chats import SYSTEM, assistant, user


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_show_and_lint(tiny_dir, tmp_path, capsys):
    good = rows_file(tmp_path / "good.jsonl", [{"prompt": "a", "completion": c} for c in "bcde"])
    model = ["--model", str(tiny_dir)]
    assert main(["data", "show", str(good), *model]) == 0
    out = capsys.readouterr().out
    assert "good.jsonl line 1: 4 tokens, 2 of them labels\n<s>|a[[b|</s>]]\n" in out
    assert "line 3" in out
    assert "line 4" not in out
    assert "\x1b" not in out
    assert main(["data", "show", str(good), *model, "--rows", "1", "--train-on", "all"]) == 0
    assert capsys.readouterr().out.endswith("[[<s>|a|b|</s>]]\n\n")
    assert main(["data", "lint", str(good), *model, "--max-seq-length", "3"]) == 0
    assert "rows longer than max_seq_length=3: 4\n" in capsys.readouterr().out
    bad = rows_file(tmp_path / "bad.jsonl", [{"messages": [user("x")]}, {"messages": [SYSTEM]}])
    assert main(["data", "lint", str(bad), *model]) == 1
    assert "rows that cannot be used: 2\n" in capsys.readouterr().out
    for command, message in [
        (["show", str(bad), *model], "bad.jsonl line 1: no turn of the assistant"),
        (["show", str(good), *model, "--train-on", "al"], "did you mean 'all'"),
        (["lint", str(good), *model, "--format", "txt"], "did you mean 'text'"),
        (["lint", str(tmp_path / "none.csv"), *model], "none.csv does not exist"),
    ]:
        assert main(["data", *command]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        main(["data", "show", str(good)])


def test_a_file_of_which_no_row_can_be_read(tiny_dir, tmp_path, capsys):
    path = rows_file(tmp_path / "r.jsonl", [{"instruction": "a"}, {"instruction": "b"}])
    assert main(["data", "lint", str(path), "--model", str(tiny_dir)]) == 1
    assert "line 1: field 'output' is missing" in capsys.readouterr().err


def test_rows_with_an_empty_answer(tiny_dir, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": text} for text in ("", "b")]
    options = [str(rows_file(tmp_path / "r.jsonl", rows)), "--model", str(tiny_dir)]
    assert main(["data", "lint", *options]) == 1
    assert "line 1: the completion is empty" in capsys.readouterr().out
    assert main(["data", "lint", *options, "--skip-empty"]) == 0
    assert capsys.readouterr().out.startswith("1 rows")
    assert main(["data", "show", *options, "--skip-empty"]) == 0
    assert "line 2" in capsys.readouterr().out


def test_color_on_a_terminal(tiny_dir, tmp_path, capsys, monkeypatch):
    good = rows_file(tmp_path / "good.jsonl", [{"text": "a"}])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    command = ["data", "show", str(good), "--model", str(tiny_dir)]
    assert main(command) == 0
    assert PLAIN in capsys.readouterr().out
    assert main([*command, "--no-color"]) == 0
    assert PLAIN not in capsys.readouterr().out


def test_text_that_no_terminal_shows(tiny_dir, tmp_path):
    """A row, a file name and a terminal that cannot be shown as text end in one error."""
    row = {"messages": [user("x"), {"role": "\ud800", "content": ""}, assistant("y z")]}
    name = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(name, "w") as file:
        file.write(json.dumps(row) + "\n")
    for verb in ("lint", "show"):
        command = [sys.executable, "-m", "lorakit", "data", verb, name, "--model", tiny_dir]
        done = subprocess.run(
            command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        )
        assert b"Traceback" not in done.stderr
        assert done.returncode == 1  # the template is given no text
        assert b"\\udcff" in done.stdout + done.stderr


def test_a_reader_that_has_seen_enough(tiny_dir, tmp_path):
    path = rows_file(tmp_path / "rows.jsonl", [{"text": "a" * 500}] * 500)
    command = [sys.executable, "-m", "lorakit", "data", "show", path, "--model", tiny_dir]
    process = subprocess.Popen(
        [*map(str, command), "--rows", "500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE


def test_split_dedup_balance_and_sample(tmp_path, capsys):
    values = [{"id": i, "text": f"text {i % 40}"} for i in range(60)]
    source = rows_file(tmp_path / "rows.jsonl", values)
    with open(source, "a") as file:
        file.write("{broken\n")
    before = source.read_bytes()

    def run(action, *options):
        code = main(["data", action, str(source), *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    parts = tmp_path / "parts"
    code, out, _ = run("split", "--out", parts, "--shares", 50, 50, 0)
    assert code == 0
    assert sorted(path.name for path in parts.iterdir()) == ["train.jsonl", "validation.jsonl"]
    assert "rows that cannot be used: 1\n" in out
    train, validation = (lk.read_rows(parts / f"{name}.jsonl") for name in ("train", "validation"))
    assert f"train.jsonl: {len(train)} of 60 rows" in out
    assert len(train) + len(validation) == 60
    assert not {row.text for row in train} & {row.text for row in validation}

    new = tmp_path / "new.jsonl"
    code, out, _ = run("dedup", "--out", new, "--near", 0.9)
    assert code == 0
    assert out.startswith(f"{new}: 40 of 61 rows\nrows left out: 20\n  {source} line 41 repeats")
    assert [json.loads(line) for line in new.read_text().splitlines()] == values[:40]

    code, out, _ = run("balance", "--out", tmp_path / "b.jsonl")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'b.jsonl'}: 40 of 61 rows\n")
    code, out, _ = run("sample", "--out", tmp_path / "s.jsonl", "--rows", 7)
    assert code == 0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 7

    for command, message in [
        (["sample", "--out", new, "--rows", 7], "new.jsonl is there already"),
        (["sample", "--out", source, "--rows", 7], "rows.jsonl is there already"),
        (["split", "--out", parts], "parts is not empty; name a new directory"),
        (["split", "--out", tmp_path / "p", "--shares", 50, 30], "percentages that sum to 100"),
        (["balance", "--out", tmp_path / "x.jsonl", "--by", "di"], "did you mean 'id'"),
    ]:
        code, _, error = run(*command)
        assert code == 1
        assert message in error
        assert error.count("\n") == 1
    assert source.read_bytes() == before
    assert not (tmp_path / "p").exists()
