"""Settings from a mapping: what a field accepts, and the sentence that refuses the rest."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.fields import (
    check_below_one,
    check_positive,
    check_share,
    check_types,
    from_mapping,
    to_dtype,
)
from lorakit.kernels.dispatch import DTYPES


@dataclass(frozen=True)
class Settings:
    number: int
    rate: float = 0.5
    choice: Literal["a", "b", "c"] = "a"
    maybe: Literal["a", "b"] | None = None
    names: list[str] = field(default_factory=list)
    ranks: dict[str, int | float] = field(default_factory=dict)
    anything: Any = None


@given(
    st.builds(
        Settings,
        number=st.integers(-(2**63) + 1, 2**63 - 1),
        rate=st.floats(allow_nan=False, allow_infinity=False),
        ranks=st.dictionaries(st.text(), st.integers(-9, 9) | st.floats(-1, 1)),
        anything=st.none() | st.text(),
    )
)
def test_what_a_field_accepts_comes_back_as_it_is(settings):
    assert from_mapping(Settings, vars(settings), "file") == settings
    check_types(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "8"}, "file: number must be int, not '8'"),
        ({"number": True}, "file: number must be int, not True"),
        ({"number": 2**63}, f"file: number must be int, not {2**63} (too large)"),
        ({"number": 1.0}, "file: number must be int, not 1.0"),
        ({"rate": float("inf")}, "file: rate must be float, not inf"),
        ({"choice": "d"}, "file: choice is 'd'; choose a, b or c"),
        ({"choice": ["a"]}, "file: choice is ['a']; choose a, b or c"),
        ({"maybe": "c"}, "file: maybe is 'c'; choose a, b or null"),
        ({"names": ["a", 1]}, "file: names must be list[str], not ['a', 1]"),
        ({"ranks": {1: 1}}, "file: ranks must be dict[str, int | float], not {1: 1}"),
        ({"nmae": 1}, "file: unknown key 'nmae' (did you mean 'names'?)"),
    ],
)
def test_what_a_field_refuses(change, message):
    with pytest.raises(lk.LorakitError) as caught:
        from_mapping(Settings, {"number": 1} | change, "file")
    assert str(caught.value) == message


def test_a_field_without_a_default_must_be_given():
    with pytest.raises(lk.LorakitError, match="file: number is missing"):
        from_mapping(Settings, {}, "file")


def test_unknown_names_may_be_passed_over():
    values = {"number": 1, "other": 2}
    assert from_mapping(Settings, values, "file", ignore_unknown=True) == Settings(1)


def test_only_the_named_fields_are_checked():
    wrong = Settings("8", rate="x")
    check_types(wrong, ["choice"])
    with pytest.raises(lk.LorakitError, match="rate must be float, not 'x'"):
        check_types(wrong, ["choice", "rate"])


def test_ranges():
    check_positive(Settings(1), "number", "rate")
    check_positive(Settings(1), "maybe", or_null=True)
    check_below_one(Settings(0), "number", "rate")
    check_share(Settings(1), "number", "rate")
    with pytest.raises(lk.LorakitError, match="number must be positive, not 0"):
        check_positive(Settings(0), "number")
    with pytest.raises(lk.LorakitError, match="number must be positive or null, not 0"):
        check_positive(Settings(0), "number", or_null=True)
    with pytest.raises(lk.LorakitError, match=r"number is 1; it must be in \[0, 1\)"):
        check_below_one(Settings(1), "number")
    with pytest.raises(lk.LorakitError, match=r"number is 2; it must be in \[0, 1\]"):
        check_share(Settings(2), "number")


def test_a_dtype_and_its_name_are_one():
    for name, dtype in DTYPES.items():
        assert to_dtype(name) is to_dtype(dtype) is dtype
    for wrong in ("int8", torch.int8, None, 3):
        with pytest.raises(lk.LorakitError, match="is not one of float32, bfloat16, float16"):
            to_dtype(wrong)
