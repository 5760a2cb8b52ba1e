"""Rows with a class: what they mean, their tokens, and the classes that they make."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.classifier import ClassifierConfig, classifier_of
from lorakit.data.schemas import Chat, Labelled, Pair, Text, fields_of
from lorakit.data.splitting import content_digest
from tests.data.files import HI, YO


def read(row, format="classification"):
    [made] = lk.read_rows([row], format=format)
    return made


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "label": "x"}, Text("a", "row 0")),
        ({"prompt": "a", "label": "x"}, Text("a", "row 0")),
        ({"prompt": "a", "completion": "b", "label": "x"}, Pair("a", "b", "row 0")),
        ({"messages": [HI, YO], "label": "x"}, Chat([HI, YO], None, 0, "row 0")),
        ({"prompt": [HI], "label": "x"}, Chat([HI], None, 0, "row 0")),
        ({"text": "a", "label": "x", "id": 7}, Text("a", "row 0")),
    ],
)
def test_what_a_row_with_a_class_means(row, text):
    made = read(row)
    assert made == Labelled(text, "x", "row 0")
    again = read(fields_of(made))
    assert content_digest(again) == content_digest(made)


def test_only_who_asks_for_classes_gets_them():
    """A text with a label may be there to learn the text."""
    assert read({"text": "a", "label": 1}, format=None) == Text("a", "row 0")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "field 'label' is missing"),
        ({"text": "a", "label": None}, "label must be text or a number, not None"),
        ({"text": "a", "label": " "}, "label must be text or a number, not ' '"),
        ({"text": "a", "label": ["x", "y"]}, "label must be one class, not the list"),
        ({"text": "a", "label": float("nan")}, "label must be text or a number"),
        ({"text": "a", "label": float("inf")}, "label must be text or a number"),
        ({"text": "", "label": 1}, "the text is empty"),
        ({"chosen": "a", "rejected": "b", "prompt": "c", "label": 1}, "of no format preference"),
        ({"label": 1}, "no field that tells its format"),
    ],
)
def test_rows_that_are_nearly_right_are_refused(row, message):
    with pytest.raises(lk.LorakitError, match=message):
        read(row)


@pytest.mark.parametrize("margin", ["high", [1], float("nan"), {"a": 1}])
def test_a_margin_is_a_number(margin):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read({**row, "margin": "1.5"}, None).margin == 1.5  # CSV has text alone
    assert read(row, None).margin is None
    with pytest.raises(lk.LorakitError, match="margin must be a number"):
        read({**row, "margin": margin}, None)


def test_a_margin_makes_no_other_row_of_a_pair():
    """A row stays in its part of a split, and its margin goes along where rows are written."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    plain, ahead = read(row, None), read({**row, "margin": 2}, None)
    assert content_digest(plain) == content_digest(ahead)
    assert read(fields_of(ahead), None) == ahead


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["b", "a", "b"], ["a", "b"]),
        ([10, 2, 0], ["0", "2", "10"]),  # in the order of numbers
        ([True, False], ["false", "true"]),
        ([1, "a"], ["1", "a"]),
    ],
)
def test_the_classes_of_rows(labels, expected):
    head = classifier_of(labels)
    assert head.labels == expected
    assert not head.regression
    assert [head.labels[int(head.target(label))] for label in labels] == [
        str(label).lower() if isinstance(label, bool) else str(label) for label in labels
    ]


def test_labels_with_a_fraction_are_numbers():
    assert classifier_of([1, 2.5]) == ClassifierConfig(problem_type="regression")
    assert classifier_of([1, 2], "regression").target(2) == 2.0
    assert classifier_of([1.0, 2.5], "single_label_classification").labels == ["1.0", "2.5"]
    assert classifier_of(["1", "2"], "regression").target("2") == 2.0  # of CSV
    with pytest.raises(lk.LorakitError, match="'good' is no number"):
        classifier_of([1.5, "good"])
    with pytest.raises(lk.LorakitError, match="every row has the label 'a'"):
        classifier_of(["a", "a"])
    with pytest.raises(lk.LorakitError, match="no row has a label"):
        classifier_of([])
    with pytest.raises(lk.LorakitError, match="'nan' is no number"):
        classifier_of(["1", "nan"], "regression")  # of CSV, whose numbers are text


def test_numbers_stand_for_classes_that_have_names():
    named = ClassifierConfig(labels=["bad", "good"])
    assert (named.target("good"), named.target(1)) == (1, 1)
    for label in (2, -1, True, "Good"):
        with pytest.raises(lk.LorakitError, match="is none of the model's"):
            named.target(label)
    numbered = ClassifierConfig(labels=["1", "2"])
    assert numbered.target(1) == 0  # its name comes first
    with pytest.raises(lk.LorakitError, match="'0' is none"):
        numbered.target(0)


@given(st.lists(st.one_of(st.text(min_size=1), st.integers()), min_size=1))
def test_each_label_has_a_class_of_its_own(labels):
    names = {str(label) for label in labels}
    if len(names) < 2:
        return
    head = classifier_of(labels)
    assert sorted(head.labels) == sorted(names)
    assert {head.target(label) for label in labels} == set(range(len(names)))


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


def test_examples_keep_the_labels_of_rows(tok, tmp_path):
    """Also those of a file, which are read once; the tokens are those of the tokenizer alone."""
    rows = [{"text": "ab", "label": 3}, {"text": "c", "label": 1}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = lk.encode_rows(path, tok, max_seq_length=8, format="classification")
    assert examples.labels == [3, 1]
    assert [each.label for each in examples] == [3, 1]
    assert examples[0].input_ids == tok.encode("ab")
    assert set(examples[0].text.labels) == {-100}
    with pytest.raises(lk.LorakitError, match=r"rows.jsonl line 1: 3 tokens, more than"):
        lk.encode_rows(path, tok, max_seq_length=2, format="classification", over_length="raise")
    dropped = lk.encode_rows(
        path, tok, max_seq_length=2, format="classification", over_length="drop"
    )
    assert dropped.labels == [1]


def test_kinds_of_rows_are_not_mixed(tok):
    rows = [read({"text": "ab", "label": 3}), read({"text": "ab"}, None)]
    with pytest.raises(lk.LorakitError, match="rows of several kinds are mixed"):
        lk.encode_rows(rows, tok, max_seq_length=8)


def test_what_is_shown_and_counted_of_classes(tok):
    rows = lk.read_rows([{"text": "ab", "label": "x"}] * 3, format="classification")
    assert ", the class x" in lk.show_rows(rows, tok)
    report = str(lk.lint_rows(rows, tok))
    assert "x" in report
