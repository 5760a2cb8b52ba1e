"""The error of lorakit, and the helpers that word its message."""

import pytest

import lorakit as lk
from lorakit.config.errors import nearest, one_of


def test_an_error_of_the_caller_is_a_value_error():
    assert issubclass(lk.LorakitError, ValueError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learning_rat", " (did you mean 'learning_rate'?)"),
        ("xyz", ""),
        (True, ""),
        (None, ""),
    ],
)
def test_nearest(name, said):
    assert nearest(name, ["learning_rate", "max_steps"]) == said


def test_one_of():
    assert one_of(["a"]) == "a"
    assert one_of(("a", "b")) == "a or b"
    assert one_of(("a", "b", "c")) == "a, b or c"
