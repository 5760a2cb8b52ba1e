"""Files of rows: they hold what the source held, and there are no halves of them."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings

import lorakit as lk
from lorakit.data.schemas import content_of, fields_of
from tests.data.chats import SYSTEM, assistant, user
from tests.data.files import CALL, TOOL, pairs, written

OF_EVERY_KIND = [
    {"prompt": "a", "completion": "b"},
    {"text": "\ud800 half a pair"},
    {"instruction": "a", "input": "", "output": "b"},
    {"messages": [SYSTEM, user("a"), assistant("b"), user("c"), CALL], "tools": [TOOL]},
    {"prompt": [user("a")], "completion": [assistant("b")], "chat_template_kwargs": {"x": 1}},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": [SYSTEM, user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [CALL], "tools": [TOOL]},
    {"prompt": "a", "completion": "b", "label": False},
    {"messages": [SYSTEM, user("a"), assistant("b")], "kto_tag": True, "tools": [TOOL]},
    {"instruction": "a", "input": "x", "output": "b", "label": True},
]


@pytest.mark.parametrize("value", OF_EVERY_KIND)
def test_the_fields_of_a_row_make_it_again(value, tmp_path):
    [row] = lk.read_rows([value])
    [again] = lk.read_rows([fields_of(row)])
    assert type(again) is type(row)
    assert content_of(again) == content_of(row)
    lk.write_rows({tmp_path / "new" / "a.jsonl": [row]})
    [again] = lk.read_rows(tmp_path / "new" / "a.jsonl")
    assert content_of(again) == content_of(row)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "jsonl.gz", "parquet"])
def test_all_fields_of_a_file_stay(tmp_path, kind):
    values = [{"prompt": f"{i} é\n", "completion": "x", "id": str(i)} for i in range(5)]
    rows = lk.read_rows(written(tmp_path / f"a.{kind}", values))
    lk.write_rows({tmp_path / "all.jsonl": rows, tmp_path / "some.jsonl": rows[:2]})
    lines = (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == values
    assert "é" in lines[0]
    part, _ = lk.split_rows(rows, (1, 0))
    lk.write_rows({tmp_path / "part.jsonl": part})
    assert (tmp_path / "part.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()


@settings(max_examples=30)
@given(pairs)
def test_parts_are_the_whole(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("parts")
    rows = lk.read_rows(written(folder / "a.jsonl", values))
    parts = {folder / f"{i}.jsonl": part for i, part in enumerate(lk.split_rows(rows)) if len(part)}
    lk.write_rows(parts)
    lines = [line for path in parts for line in path.read_bytes().splitlines()]
    key = json.dumps
    assert sorted(map(json.loads, lines), key=key) == sorted(values, key=key)


def test_nothing_is_overwritten_and_nothing_is_half(tmp_path):
    rows = lk.read_rows([{"text": "a"}])
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("precious")
    for files, said in [
        ({new: rows, old: rows}, "old.jsonl is there already; name a new file"),
        ({new: rows, tmp_path / "b.jsonl": []}, "b.jsonl would have no rows"),
        ({new: rows, tmp_path / "b.csv": rows}, "b.csv: rows are written as JSON Lines"),
    ]:
        with pytest.raises(lk.LorakitError, match=said):
            lk.write_rows(files)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    assert old.read_text() == "precious"


def test_a_source_that_breaks_in_the_middle_leaves_no_file(tmp_path):
    source = written(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(100)])
    rows = lk.read_rows(source)
    source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(lk.LorakitError, match="was changed after it was read"):
        lk.write_rows({tmp_path / "b.jsonl": rows})
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("value", "said"), [(datetime.date(2026, 1, 1), "date"), (float("nan"), "not JSON compliant")]
)
def test_what_json_has_no_form_for_is_refused(tmp_path, value, said):
    rows = lk.read_rows(written(tmp_path / "a.parquet", [{"text": "a", "at": value}]))
    with pytest.raises(lk.LorakitError, match=f"row 0 cannot be written as JSON: .*{said}"):
        lk.write_rows({tmp_path / "b.jsonl": rows})
    assert not (tmp_path / "b.jsonl").exists()


SLOW = """
import sys, time
import lorakit as lk

class Slow:
    def __len__(self):
        return 10
    def __getitem__(self, i):
        return {"text": str(i)}

rows = lk.read_rows(Slow())
rows.fields = lambda i: print("go", flush=True) or time.sleep(60)
try:
    lk.write_rows({sys.argv[1]: rows})
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_leaves_no_half_file(tmp_path):
    out = tmp_path / "b.jsonl"
    command = [sys.executable, "-c", SLOW, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as process:
        try:
            assert process.stdout.readline() == b"go\n"
            assert list(tmp_path.iterdir())  # it is at work
            time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
        finally:
            process.kill()
    assert not list(tmp_path.iterdir())
