"""What completions are worth: built-in rewards, the user's functions, and what is refused."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.schemas import Prompt
from lorakit.training.rollouts.rewards import Graded, Rewards


def graded(text, prompt="p", **columns):
    return Graded(Prompt(prompt, None, None, columns, "rows.jsonl line 3"), text)


def of(completion, name, answer=None, **options):
    """Return the reward of one completion."""
    columns = {} if answer is None else {"answer": answer}
    found = Rewards([lk.RewardConfig(name, **options)], {})([graded(completion, **columns)])
    return found[name][0]


@pytest.mark.parametrize(
    ("completion", "name", "answer", "options", "worth"),
    [
        (" four\n", "exact_match", "four", {}, 1),
        ("four", "exact_match", "Four", {}, 0),
        ("7", "exact_match", 7, {}, 1),
        ("That makes 4 + 3 = 7.", "numeric_answer", "#### 7", {}, 1),
        ("1,234.50", "numeric_answer", 1234.5, {}, 1),
        ("from 10-3", "numeric_answer", "3", {}, 1),
        ("x = -3", "numeric_answer", "-3", {}, 1),
        ("-3", "numeric_answer", "3", {}, 0),
        ("1e3", "numeric_answer", 1000, {}, 1),
        ("none", "numeric_answer", 0, {}, 0),
        ("<b>", "regex", None, {"pattern": "^<.>$"}, 1),
        ("x<b>", "regex", None, {"pattern": "^<.>$"}, 0),
        ("12345678", "length", None, {"length": 8}, 1),
        ("123456", "length", None, {"length": 8}, 0.75),
        ("1" * 10, "length", None, {"length": 8}, 0.75),
        ("1" * 99, "length", None, {"length": 8}, 0),
        ("", "length", None, {"length": 8}, 0),
    ],
)
def test_built_in(completion, name, answer, options, worth):
    assert of(completion, name, answer, **options) == worth


SCHEMA = {
    "type": "object",
    "properties": {"age": {"$ref": "#/$defs/age"}},
    "required": ["age"],
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ('{"age": 3}', 1),
        (' {"age": 3, "name": "x"}\n', 1),
        ('{"age": -3}', 0),
        ('{"age": "3"}', 0),
        ("{}", 0),
        ('{"age": 3} and more', 0),
        ('{"age": NaN}', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_json_that_fits_a_schema(completion, worth):
    assert of(completion, "json_schema", schema=SCHEMA) == worth


def test_schemas_that_are_refused(monkeypatch):
    """A reference to another place is not fetched, and is told when a completion comes to it."""
    with pytest.raises(lk.LorakitError, match="the schema is none: 'text' is not valid"):
        of("1", "json_schema", schema={"type": "text"})
    with pytest.raises(lk.LorakitError, match=r"the schema lacks 'https://example.org/a.json'"):
        of("1", "json_schema", schema={"$ref": "https://example.org/a.json"})
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(
        lk.LorakitError, match=r"needs jsonschema; pip install 'lorakit\[rewards\]'"
    ):
        of("1", "json_schema", schema=SCHEMA)


@given(st.text())
def test_any_text_has_a_reward(text):
    assert of(text, "numeric_answer", "5") in (0, 1)
    assert 0 <= of(text, "length", length=7) <= 1
    assert of(text, "json_schema", schema=SCHEMA) in (0, 1)


def test_functions_are_called_as_trl_calls_them():
    """They get names, chats as messages, and a list of each column, None where a row has none."""

    def first(prompts, completions, **columns):
        assert prompts == ["p", [{"role": "user", "content": "Hi"}]]
        assert completions == ["a", [{"role": "assistant", "content": "b"}]]
        assert columns == {"x": [1, None], "y": [None, 2]}
        return [1, 0.5]

    configs = [lk.RewardConfig("first", weight=2), lk.RewardConfig("length", length=2)]
    rewards = Rewards(configs, {"first": first})
    found = rewards([graded("a", x=1), graded("b", [{"role": "user", "content": "Hi"}], y=2)])
    assert found == {"first": [1.0, 0.5], "length": [0.5, 0.5]}
    assert rewards.total(found) == [2.5, 1.5]


def test_trls_own_rewards_run():
    """One of TRL's, unchanged: it wants chats, and ignores what it does not know."""
    from trl.rewards import think_format_reward

    name = "think"
    prompt = [{"role": "user", "content": "Hi"}]
    rewards = Rewards([lk.RewardConfig(name)], {name: think_format_reward})
    texts = "<think>a</think>b", "b"
    assert rewards([graded(text, prompt) for text in texts]) == {name: [1.0, 0.0]}


def test_a_function_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brief(completions, **_):\n    return [-len(c) for c in completions]\n")
    assert of("abc", f"{path}:brief") == -3
    with pytest.raises(lk.LorakitError, match="no function 'brieff' .did you mean 'brief'"):
        of("abc", f"{path}:brieff")
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(lk.LorakitError, match="mine.py failed with ModuleNotFoundError"):
        of("abc", f"{path}:brief")
    with pytest.raises(lk.LorakitError, match="others.py is no Python file"):
        of("abc", f"{tmp_path / 'others.py'}:brief")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **_: [float("nan")], "line 3: reward mine is nan for the completion 'abc'"),
        (lambda **_: [None], "line 3: reward mine is None for .* must be a finite number"),
        (lambda **_: "1", "line 3: reward mine is '1' for .* must be a finite number"),
        (lambda **_: [10**400], "line 3: reward mine is 10+ for .* must be a finite number"),
        (lambda **_: [1.0, 2.0], "reward mine returned 2 numbers for 1 completions"),
        (lambda **_: 1 / 0, "mine failed with ZeroDivisionError: .*on completions of .*line 3"),
        (lambda completions: [1.0], "mine failed with TypeError"),
    ],
)
def test_functions_that_fail(function, message):
    with pytest.raises(lk.LorakitError, match=message):
        Rewards([lk.RewardConfig("mine")], {"mine": function})([graded("abc")])


def test_a_column_that_a_function_gets_anyway():
    rewards = Rewards([lk.RewardConfig("mine")], {"mine": lambda **given: [0.0]})
    rewards.check_columns([graded("", prompt="p", answer="4").row])
    with pytest.raises(lk.LorakitError, match="line 3: reward functions get 'prompts' from"):
        rewards.check_columns([Prompt("p", None, None, {"prompts": 1}, "rows.jsonl line 3")])


def test_rows_without_an_answer():
    with pytest.raises(lk.LorakitError, match="line 3 has no field 'answer', which reward exact"):
        of("x", "exact_match")
    with pytest.raises(lk.LorakitError, match="line 3: field 'answer' holds no number"):
        of("x", "numeric_answer", "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "regex"}, "reward regex: pattern is missing"),
        ({"name": "regex", "pattern": "("}, r"'\(' is no valid regular expression"),
        ({"name": "length"}, "reward length: length is missing"),
        ({"name": "length", "length": 0}, "length must be positive"),
        ({"name": "json_schema"}, "reward json_schema: schema is missing"),
        ({"name": "exact_match", "pattern": "x"}, "pattern goes with regex alone"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(lk.LorakitError, match=message):
        lk.RewardConfig(**options)


def test_an_unknown_reward():
    with pytest.raises(lk.LorakitError, match=r"'exact' is unknown .did you mean 'exact_match'"):
        Rewards([lk.RewardConfig("exact")], {})


def test_rewards_are_checked_before_a_model_is_loaded(tmp_path):
    """Their files are not run yet."""
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit\n")

    def check(name):
        grpo = lk.GrpoConfig([lk.RewardConfig(name)])
        lk.check_outputs(lk.TrainConfig(str(tmp_path), objective="grpo", grpo=grpo))

    check(f"{path}:brief")
    for name, message in (("exact", "'exact' is unknown"), ("other.py:f", "is no Python file")):
        with pytest.raises(lk.LorakitError, match=message):
            check(name)
