"""Rows that several tests read, and files of them."""

import csv
import gzip
import json

import pytest
from hypothesis import strategies as st

HI, YO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"role": "assistant", "tool_calls": [TOOL], "reasoning_content": "r", "name": "n"}

ROWS = [
    {"prompt": 'a "quoted", comma', "completion": "two\nlines"},
    {"prompt": "", "completion": "é 😀 \u2028 "},
    {"prompt": "x\r\ny", "completion": '"'},
]


def written(path, rows):
    """`rows` in the kind of file that the suffix names; CSV by Python, Parquet by pyarrow."""
    if path.suffix == ".gz":
        plain = written(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


texts = st.text(max_size=15)


pairs = st.lists(
    st.fixed_dictionaries({"prompt": texts, "completion": texts.filter(bool)}),
    min_size=1,
    max_size=6,
)
