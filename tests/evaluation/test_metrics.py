"""Each metric against its definition: brute force, and values worked out by hand.

The hand-worked values of F1 and of entities are those of scikit-learn 1.9's f1_score and of
seqeval 1.2's f1_score.
"""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from lorakit.config.metrics import METRICS
from lorakit.evaluation import metrics

OWN = [name for name in METRICS if name not in ("bleu", "chrf")]  # test_translation.py has these

words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7)


def brute_force(a, b):
    """The longest subsequence of a that is one of b, by trying all."""

    def is_subsequence(part):
        rest = iter(b)
        return all(word in rest for word in part)

    sizes = range(len(a), 0, -1)
    return next((n for n in sizes if any(map(is_subsequence, itertools.combinations(a, n)))), 0)


@given(words, words)
def test_is_the_f1_of_the_longest_common_subsequence(a, b):
    common = brute_force(a, b)
    expected = 0.0
    if common:
        precision, recall = common / len(a), common / len(b)
        expected = 2 * precision * recall / (precision + recall)
    assert lk.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)
    assert lk.rouge_l(" ".join(a), " ".join(b)) == lk.rouge_l(" ".join(b), " ".join(a))


def test_words():
    assert lk.rouge_l("Return the X-ray, now.", "return the x ray now") == 1.0
    assert lk.rouge_l("", "") == 0.0
    assert lk.rouge_l("the cat sat", "the dog sat") == pytest.approx(2 / 3)
    assert lk.rouge_l("größe", "GRÖSSE") == 0.0
    assert lk.rouge_l("naïve_x", "naïve x") == 1.0


# ---- of lists of texts ----

CATS = (["cat", "cat", "dog", "emu"], ["cat", "dog", "dog", "dog"])
labels = st.sampled_from(["a", "b", "c", "d"])
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=12)


def test_f1_of_labels_by_hand():
    """cat: tp 1, fp 1: 2/3. dog: tp 1, fn 2: 1/2. emu: fp 1: 0."""
    assert metrics.accuracy(*CATS) == 0.5
    assert metrics.macro_f1(*CATS) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert metrics.weighted_f1(*CATS) == pytest.approx((2 / 3 + 3 * 1 / 2) / 4)
    assert metrics.macro_f1([" Yes\n"], ["yes"]) == 1.0


@settings(max_examples=50)
@given(pairs)
def test_scores_of_labels_are_those_of_scikit_learn(pairs):
    found = pytest.importorskip("sklearn.metrics")
    predictions, references = map(list, zip(*pairs, strict=True))
    scores = lk.metrics.score(predictions, references, ["macro_f1", "weighted_f1", "accuracy"])
    for name, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):
        options = {"average": average, "zero_division": 0}
        assert scores[name] == pytest.approx(found.f1_score(references, predictions, **options))
    assert scores["accuracy"] == found.accuracy_score(references, predictions)


tags = st.lists(st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]), min_size=1, max_size=7)


@settings(max_examples=50)
@given(st.lists(st.tuples(tags, tags), min_size=1, max_size=5))
def test_scores_of_entities_are_those_of_seqeval(pairs):
    found = pytest.importorskip("seqeval.metrics")
    cut = [(p[: len(r)], r[: len(p)]) for p, r in pairs]
    predictions, references = map(list, zip(*cut, strict=True))
    texts = [[" ".join(tags) for tags in side] for side in (predictions, references)]
    expected = found.f1_score(references, predictions, zero_division=0)
    assert lk.metrics.entity_f1(*texts) == pytest.approx(expected)


@given(pairs)
def test_f1_of_labels_is_its_definition(pairs):
    """Precision and recall of each label are counted one at a time."""
    occurring = {label for pair in pairs for label in pair}
    f1 = {}
    for label in occurring:
        tp = sum(p == r == label for p, r in pairs)
        precision = tp / max(1, sum(p == label for p, _ in pairs))
        recall = tp / max(1, sum(r == label for _, r in pairs))
        f1[label] = 2 * precision * recall / (precision + recall) if tp else 0.0
    predictions, references = map(list, zip(*pairs, strict=True))
    scores = lk.metrics.score(predictions, references, ["macro_f1", "weighted_f1", "accuracy"])
    assert scores["macro_f1"] == pytest.approx(sum(f1.values()) / len(f1))
    support = {label: sum(r == label for _, r in pairs) for label in occurring}
    weighted = sum(f1[label] * n for label, n in support.items()) / len(pairs)
    assert scores["weighted_f1"] == pytest.approx(weighted)
    assert scores["accuracy"] == sum(p == r for p, r in pairs) / len(pairs)


@settings(max_examples=15)  # its functions take milliseconds to check their arguments
@given(pairs)
def test_f1_of_labels_is_that_of_scikit_learn(pairs):
    learn = pytest.importorskip("sklearn.metrics")
    predictions, references = map(list, zip(*pairs, strict=True))
    assert metrics.accuracy(predictions, references) == learn.accuracy_score(
        references, predictions
    )
    for name in ("macro", "weighted"):
        # sums of as many fp64 numbers in another order
        assert metrics.score(predictions, references, f"{name}_f1")[f"{name}_f1"] == pytest.approx(
            learn.f1_score(references, predictions, average=name, zero_division=0), rel=1e-12
        )


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "partial"),
    [
        ("Rome", "Rome", 1, 1),
        (" Rome\n", "Rome", 1, 1),
        ("rome", "Rome", 0, 1),
        ("It is Rome, Italy.", "rome italy", 0, 1),
        ("Rome", "It is Rome", 0, 0),
        ("Romeo", "Rome", 0, 0),
        ("Rome in Italy", "Rome Italy", 0, 0),
        ("?", "?", 1, 1),
        ("a ?", "?", 0, 0),
        ("", "Rome", 0, 0),
    ],
)
def test_matches(prediction, reference, exact, partial):
    scores = metrics.score([prediction], [reference], ["exact_match", "partial_match"])
    assert scores == {"exact_match": exact, "partial_match": partial}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1),
        ("B-PER O O B-LOC", "B-PER I-PER O B-LOC", 1 / 2),  # the end of PER is wrong
        ("B-LOC I-LOC O B-LOC", "B-PER I-PER O B-LOC", 1 / 2),  # the type is
        ("B-PER I-PER", "B-PER I-PER O B-LOC", 2 / 3),  # cut off
        ("B-PER B-PER", "B-PER I-PER", 0),  # two are not one
        ("I-PER I-PER", "B-PER I-PER", 1),  # CoNLL: an I- may begin
        ("B-PER I-LOC", "B-PER B-LOC", 1),
        ("O O", "O O", 0),  # nothing to find, nothing found
        ("nothing here", "O B-LOC", 0),
        ("PER: Ann Lee; LOC: Rome", "LOC: Rome\nPER: Ann Lee", 1),
        ("PER: Ann; LOC: Rome", "PER: Ann Lee; LOC: Rome", 1 / 2),
        ("PER: Ann", "PER: Ann; PER: Ann", 2 / 3),
        ("PER: Ann; none", "PER: Ann", 1),
        ("TIME: 10:30", "TIME: 10:30", 1),
        ("", "PER: Ann", 0),
    ],
)
def test_entities_by_hand(prediction, reference, expected):
    assert metrics.entity_f1([prediction], [reference]) == pytest.approx(expected)


def test_entities_are_counted_over_all_texts():
    """1 of 1 found, then 1 of 3: tp 2, fp 0, fn 2, not the mean of 1 and 1/2."""
    predictions = ["LOC: Rome", "PER: Ann"]
    references = ["LOC: Rome", "PER: Ann; PER: Bob; PER: Cid"]
    assert metrics.entity_f1(predictions, references) == pytest.approx(4 / 6)


spans = st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.booleans()))


def as_tags(pieces):
    """Tags of entities and gaps laid end to end, and the entities' types and places."""
    tags, found = [], set()
    for kind, size, entity in pieces:
        if entity:
            found.add((kind, len(tags), len(tags) + size))
            tags += [f"B-{kind}"] + [f"I-{kind}"] * (size - 1)
        else:
            tags += ["O"] * size
    return " ".join(tags), found


@given(spans, spans)
def test_tags_mean_the_spans_they_were_made_from(one, other):
    (predicted, found), (true, wanted) = as_tags(one), as_tags(other)
    hits = len(found & wanted)
    expected = 2 * hits / (len(found) + len(wanted)) if hits else 0.0
    assert metrics.entity_f1([predicted], [true]) == pytest.approx(expected)


texts = st.lists(st.text("aB 0-O:;I\n", max_size=9) | st.text(max_size=5), min_size=1, max_size=5)


@given(st.data(), texts)
def test_every_metric_of_any_text(data, references):
    size = len(references)
    predictions = data.draw(st.lists(st.sampled_from(references), min_size=size, max_size=size))
    scores = metrics.score(predictions, references, OWN)
    assert list(scores) == OWN
    assert all(0 <= value <= 1 for value in scores.values())
    assert scores["exact_match"] <= scores["partial_match"]
    assert scores["exact_match"] <= scores["accuracy"]
    same = metrics.score(references, references, OWN)
    for name in ("exact_match", "partial_match", "accuracy", "macro_f1", "weighted_f1"):
        assert same[name] == pytest.approx(1)
    order = data.draw(st.permutations(range(size)))
    shuffled = [predictions[i] for i in order], [references[i] for i in order]
    assert metrics.score(*shuffled, OWN) == pytest.approx(scores)


def test_refused():
    with pytest.raises(lk.LorakitError, match="metric 'rouge-l' .did you mean 'rouge_l'"):
        metrics.score(["a"], ["a"], "rouge-l")
    with pytest.raises(lk.LorakitError, match="beside loss and perplexity there are accuracy, "):
        metrics.score(["a"], ["a"], ["perplexity"])
    for predictions, references in ([], []), (["a"], []), (["a"], ["a", "b"]):
        with pytest.raises(lk.LorakitError, match="as many of one as of the other"):
            metrics.score(predictions, references, OWN)
