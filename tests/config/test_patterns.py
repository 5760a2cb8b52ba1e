"""Patterns of ranks and alphas, and where a layer lies."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.config.patterns import (
    each_alone,
    endings,
    in_pattern,
    lies_in,
    of_pattern,
    valid_regex,
)

names = st.lists(st.sampled_from(["model", "layers", "0", "q_proj", "up"]), min_size=1).map(
    ".".join
)


@given(st.dictionaries(names, st.integers(), min_size=1))
def test_every_entry_means_one_layer_alone(values):
    """The entry made for a layer is the only one that means it."""
    pattern = each_alone(values, values)
    for name, value in values.items():
        assert [key for key in pattern if in_pattern(key, name)] == [
            key for key in pattern if key.removeprefix("^") == name
        ]
        assert of_pattern(pattern, name, None) == value


def test_a_bare_name_is_kept_where_it_is_clear():
    assert each_alone({"a.q": 1, "b.q": 2}, ["a.q", "b.q"]) == {"a.q": 1, "b.q": 2}
    assert each_alone({"q": 1}, ["q", "b.q"]) == {"^q": 1}


def test_endings_follow_a_dot():
    assert endings(["a.b.c", "d"]) == {"b.c", "c"}


@pytest.mark.parametrize(
    ("key", "name", "meant"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("proj", "model.q_proj", False),
        (r"layers\.\d\.q_proj", "model.layers.3.q_proj", True),
        ("^q_proj", "model.q_proj", False),
        ("a|b", "x.b", True),
    ],
)
def test_what_a_key_means(key, name, meant):
    assert in_pattern(key, name) is meant


def test_the_first_key_that_means_a_layer_decides():
    assert of_pattern({"q": 1, "a.q": 2}, "a.q", 3) == 1
    assert of_pattern({"k": 1}, "a.q", 3) == 3


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_what_is_no_regex(pattern):
    assert not valid_regex(pattern)
    assert valid_regex(re.escape(pattern))


@pytest.mark.parametrize(
    ("name", "module", "inside"),
    [
        ("model.layers.1.mlp.up_proj", "mlp", True),
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("model.layers.11.mlp", "layers.1", False),
        ("mlp", "mlp", True),
        ("mlp", "mlp.up_proj", False),
    ],
)
def test_where_a_layer_lies(name, module, inside):
    assert lies_in(name, module) is inside
