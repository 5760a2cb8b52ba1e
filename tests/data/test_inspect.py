"""Rows shown as the model sees them, and what is wrong with them."""

import json

import pytest

import lorakit as lk
from lorakit.cli.main import main
from lorakit.data.inspect import show_rows
from lorakit.data.lint import lint_rows
from tests.data.chats import SYSTEM, assistant, user


def test_show_marks_labels(tok):
    rows = lk.read_rows([{"prompt": "a ", "completion": "b\té\n\x1b"}])
    shown = show_rows(rows, tok)
    assert shown == ("row 0: 10 tokens, 7 of them labels\n<s>|a|·[[b|→|é|↵\n|\\x1b|</s>]]\n")
    colored = show_rows(rows, tok, color=True)
    assert "\x1b[2m<s>\x1b[0m|" in colored
    assert "\x1b[30;42mé\x1b[0m|\x1b[30;42m↵\x1b[0m\n" in colored
    assert "\\x1b" in colored  # what the data holds stays text


def test_show_good_and_bad_answers(tok):
    row = {"prompt": "a ", "completion": "b"}
    rows = lk.read_rows([row | {"label": True}, row | {"label": False}])
    shown = "5 tokens, 2 of them labels, a {} answer\n<s>|a|·[[b|</s>]]\n"
    assert show_rows(rows, tok) == "\n".join(
        f"row {i}: {shown.format(kind)}" for i, kind in enumerate(("good", "bad"))
    )


def test_show_holds_every_character(smollm2):
    """The text less marks and bars is the rendered chat."""
    tok = lk.load_tokenizer(smollm2)
    text = "naïve 😀 中文 x\u202ey"
    shown = show_rows(lk.read_rows([{"messages": [user(text), assistant("Yo!")]}]), tok)
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


def test_many_findings_are_cut(tok):
    report = lint_rows(lk.read_rows([{"text": "a"}] * 9), tok)
    assert (
        "rows that repeat an earlier one, but for white space: 8\n  row 1 repeats row 0\n"
        in str(report)
    )
    assert "  and 3 more" in str(report)
