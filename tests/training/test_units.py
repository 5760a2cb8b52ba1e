"""Sizes of memory as text: what is read, what is refused, and that writing and reading agree."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 << 30),
        ("24g", 24 * 10**9),
        ("24Gi", 24 << 30),
        ("24576MiB", 24 << 30),
        (" 0.5tb ", 5 * 10**11),
        ("1k", 1000),
        ("23.5 GiB", 47 << 29),
    ],
)
def test_sizes(text, size):
    assert lk.memory.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "24", "GB", "-3GB", "1e3GB", "24 G B", "24GBs", "٣GB", "24,5GB", "inf GB", "24kiB.b"],
)
def test_what_is_no_size_is_refused_in_a_sentence(text):
    with pytest.raises(lk.LorakitError, match="is no size of memory; write a number and its unit"):
        lk.memory.parse_bytes(text)


@pytest.mark.parametrize("text", ["0GB", "0.0001k", "9" * 400 + "GB", "2000000TB"])
def test_what_no_machine_has_is_refused(text):
    with pytest.raises(lk.LorakitError, match="is no size of memory that a machine has"):
        lk.memory.parse_bytes(text)


@given(st.text(max_size=20) | st.from_regex(r"[0-9.]{1,8} ?[a-zA-Z]{0,4}", fullmatch=True))
def test_any_text_is_a_size_or_one_error(text):
    try:
        assert 0 < lk.memory.parse_bytes(text) <= 1 << 60
    except lk.LorakitError as error:
        assert "\n" not in str(error)


@given(st.integers(min_value=1000, max_value=1 << 50))
def test_a_size_that_was_written_is_read_again(size):
    """What is written has two digits at least, so at most 5 % are lost."""
    assert lk.memory.parse_bytes(lk.memory.format_bytes(size)) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 kB"),
        (840, "0.8 kB"),
        (9_949, "9.9 kB"),
        (9_950, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.0 GB"),
        (7_449_000_000, "7.4 GB"),
    ],
)
def test_written_sizes(size, text):
    assert lk.memory.format_bytes(size) == text
    assert re.fullmatch(r"[0-9.]+ [kMG]B", text)
