"""`lorakit data`: tokens as the model sees them, and what is wrong with rows."""

import json
import os
import signal
import subprocess
import sys

import pytest

import lorakit as lk
from lorakit.cli.main import main
from lorakit.data.inspect import PLAIN, lint_rows, show_rows
from tests.data.chats import SYSTEM, assistant, user


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_show_marks_labels(tok):
    rows = lk.read_rows([{"prompt": "a ", "completion": "b\té\n\x1b"}])
    shown = show_rows(rows, tok)
    assert shown == ("row 0: 10 tokens, 7 of them labels\n<s>|a|·[[b|→|é|↵\n|\\x1b|</s>]]\n")
    colored = show_rows(rows, tok, color=True)
    assert "\x1b[2m<s>\x1b[0m|" in colored
    assert "\x1b[30;42mé\x1b[0m|\x1b[30;42m↵\x1b[0m\n" in colored
    assert "\\x1b" in colored  # what the data holds stays text


def test_show_holds_every_character(smollm2):
    """Without marks and bars the text is the rendered chat."""
    tok = lk.load_tokenizer(smollm2)
    text = "naïve 😀 中文 x\u202ey"
    [shown] = [show_rows(lk.read_rows([{"messages": [user(text), assistant("Yo!")]}]), tok)]
    rendered = tok.apply_chat_template([user(text), assistant("Yo!")], tokenize=False)
    body = shown.partition("\n")[2].replace("<|", "<¦").replace("|>", "¦>")
    for mark in ("|", "[[", "]]"):
        body = body.replace(mark, "")
    body = body.replace("¦", "|").replace("·", " ").replace("↵", "").replace("\\u202e", "\u202e")
    assert body.strip("\n") == rendered.strip("\n")
    assert "[[Y|o|!|<|im_end|>]]" in shown


def test_lint(tok):
    values = [
        {"messages": [user("Is it?"), assistant("yes")]},
        {"messages": [user("Is  it?\n"), assistant("yes")]},
        {"messages": [user(" "), assistant("no")]},
        {"messages": [SYSTEM, user("Why?")]},
        {"messages": [user("long " * 20), assistant("no")]},
        {
            "messages": [
                user("other"),
                assistant("a longer answer that nobody else gives, so no class"),
            ]
        },
    ]
    report = lint_rows(lk.read_rows(values), tok, max_seq_length=90)
    assert report.rows == 6
    assert report.duplicates == [("row 1", "row 0")]
    assert report.empty == ["row 2, message 0 (user)"]
    assert report.over_long == ["row 4: 123 tokens"]
    assert report.unusable == ["row 3: no turn of the assistant is there to learn"]
    assert report.classes == {"yes": 2, "no": 2}
    assert sum(report.lengths.values()) == 5
    text = str(report)
    assert text.startswith("6 rows, ")
    assert "   33.3%  yes" in text
    assert "rows longer than max_seq_length=90: 1\n  row 4: 123 tokens" in text
    assert "median 32, 95% up to 123\n" in text
    bars = [line for line in text.splitlines() if "#" in line]
    assert sum(int(line.split()[-1]) for line in bars) == 5


def test_lint_of_every_format(tok):
    for row in (
        {"prompt": " ", "completion": "b"},
        {"instruction": " ", "output": "b"},
        {"text": " "},
        {"prompt": " ", "chosen": "b", "rejected": "c"},
    ):
        report = lint_rows(lk.read_rows([row, row]), tok)
        assert sorted({place[:6] for place in report.empty}) == ["row 0,", "row 1,"]
        assert len(report.duplicates) == 1
        assert not report.unusable


def test_pairs(tok):
    """Lengths are those of both answers, the limit that of one."""
    rows = lk.read_rows([{"prompt": "a", "chosen": "b" * 9, "rejected": "c"}])
    assert show_rows(rows, tok) == (
        "row 0, chosen: 12 tokens, 10 of them labels\n<s>|a[[b|b|b|b|b|b|b|b|b|</s>]]\n\n"
        "row 0, rejected: 4 tokens, 2 of them labels\n<s>|a[[c|</s>]]\n"
    )
    report = lint_rows(rows, tok, max_seq_length=11)
    assert (report.lengths, report.labels) == ({16: 1}, 12)
    assert report.over_long == ["row 0: 12 tokens"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_all_rows_that_cannot_be_read_are_listed(tiny_dir, tmp_path, capsys, kind):
    good = [{"prompt": "a", "completion": c} for c in "bc"]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion\na\na,b\na,b,c\na,\na,c\n")
        wrong = ["line 2: 1 fields", "line 4: 3 fields", "line 5: the completion is empty"]
    elif kind == "json":
        path.write_text(json.dumps([3, good[0], {"prompt": "a"}, good[1], {"text": "x"}]))
        wrong = ["item 0 must be an object", "item 2: field 'completion'", "item 4: field 'prompt'"]
    else:
        lines = ["[3]", json.dumps(good[0]), '{"prompt": ', '{"text": "x"}', json.dumps(good[1])]
        path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n')
        wrong = ["line 1 must be", "line 3 is not valid", "line 4: field", "line 6 is not UTF-8"]
    assert main(["data", "lint", str(path), "--model", str(tiny_dir)]) == 1
    found = capsys.readouterr().out
    assert found.startswith(f"{2 + len(wrong)} rows, 8 tokens, 4 of them labels\n")
    assert f"rows that cannot be used: {len(wrong)}\n" in found
    for text in wrong:
        assert f"{path} {text}" in found
    errors = []
    rows = lk.read_rows(path, errors=errors)
    assert len(errors) == len(wrong)
    assert [row.completion for row in rows] == ["b", "c"]
    assert [rows[i].completion for i in (0, 1, -1)] == ["b", "c", "c"]
    with pytest.raises(lk.LorakitError, match=r"rows\."):
        lk.read_rows(path)


def test_a_file_of_which_no_row_can_be_read(tiny_dir, tmp_path, capsys):
    path = rows_file(tmp_path / "r.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert main(["data", "lint", str(path), "--model", str(tiny_dir)]) == 1
    assert "line 1: field 'completion' is missing" in capsys.readouterr().err


def test_many_findings_are_cut(tok):
    report = lint_rows(lk.read_rows([{"text": "a"}] * 9), tok)
    assert (
        "rows that repeat an earlier one, but for white space: 8\n  row 1 repeats row 0\n"
        in str(report)
    )
    assert "  and 3 more" in str(report)


def test_command_line(tiny_dir, tmp_path, capsys):
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


def test_color_on_a_terminal(tiny_dir, tmp_path, capsys, monkeypatch):
    good = rows_file(tmp_path / "good.jsonl", [{"text": "a"}])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    command = ["data", "show", str(good), "--model", str(tiny_dir)]
    assert main(command) == 0
    assert PLAIN in capsys.readouterr().out
    assert main([*command, "--no-color"]) == 0
    assert PLAIN not in capsys.readouterr().out


def test_text_that_no_terminal_shows(tiny_dir, tmp_path):
    """Half a surrogate pair, a name that is not UTF-8, a terminal that knows ASCII only."""
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
