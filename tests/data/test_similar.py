"""Near duplicates: sketches against sets of shingles, and what is found against all pairs."""

import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.data.similar import SKETCH, band_width, signature_of, similar_rows, similarity
from lorakit.data.similar import sketch_of as sketch


def shingles(text):
    words = re.findall(r"\w+", text.casefold())
    words += [""] * (3 - len(words)) if words else []
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b) if a | b else 0.0


sentences = st.lists(st.sampled_from(["a", "B", "b.", "cc", "d"]), max_size=12).map(" ".join)


@given(sentences, sentences)
def test_the_similarity_of_sketches_is_that_of_sets(a, b):
    assert len(sketch([a])) == len(shingles(a))
    assert similarity(sketch([a]), sketch([b])) == jaccard(a, b)


def test_ideographs_are_words():
    assert len(sketch(["今天天气很好"])) == 4  # 6 characters have 4 shingles of 3
    assert similarity(sketch(["今天天气很好"]), sketch(["今天,天气很好!"])) == 1


def text_of(numbers):
    return " ".join(f"w{n}" for n in numbers)


def test_long_texts_are_estimated():
    a, b = text_of(range(6000)), text_of(range(1500, 7500))
    assert len(sketch([a])) == SKETCH
    # a binomial of 1024 draws has a deviation below 0.016; the hashes are fixed, so this is no luck
    assert similarity(sketch([a]), sketch([b])) == pytest.approx(jaccard(a, b), abs=0.03)


def test_signatures_agree_as_often_as_the_similarity_says():
    agree = []
    for i in range(30):
        a, b = text_of(range(i, i + 300)), text_of(range(i + 100, i + 400))
        agree.append((signature_of(sketch([a])) == signature_of(sketch([b]))).mean())
    # 30 times 128 places, of which 1/2 agree: three deviations are 0.025
    assert np.mean(agree) == pytest.approx(jaccard(a, b), abs=0.025)


def some_rows(n, seed=0):
    """Rows of which every third is an earlier one with some words exchanged."""
    rng = random.Random(seed)
    texts = []
    for i in range(n):
        words = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(20, 60))]
        if i % 3 == 2:
            words = rng.choice(texts).split()
            for _ in range(rng.randrange(4)):
                words[rng.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("limit", [0.5, 0.8])
def test_what_is_found_is_what_all_pairs_tell(limit):
    texts = some_rows(120)
    found = similar_rows(lk.read_rows([{"text": t} for t in texts]), limit)
    assert all(jaccard(texts[f.row], texts[f.like]) == f.similarity >= limit for f in found)
    kept, gone = [], set()
    for i, text in enumerate(texts):  # the truth: every row with all that stay before it
        if any(jaccard(text, texts[k]) >= limit for k in kept):
            gone.add(i)
        else:
            kept.append(i)
    assert len(gone) > 10
    assert {f.row for f in found} == gone  # at most 1 in 100 at the limit is missed: here none


def test_rows_like_those_of_another_source():
    texts = some_rows(120)
    rows = [lk.read_rows([{"text": t} for t in part]) for part in (texts[:60], texts[60:])]
    found = similar_rows(rows[0], 0.8, others=rows[1])
    truth = {i for i, t in enumerate(texts[60:]) if any(jaccard(t, o) >= 0.8 for o in texts[:60])}
    assert {f.row for f in found} == truth != set()
    assert all(jaccard(texts[60 + f.row], texts[f.like]) == f.similarity for f in found)


def test_what_most_rows_say_does_not_count():
    frame = text_of(range(100))
    values = [{"prompt": f"{frame} x{i} y{i} z{i}", "completion": "yes"} for i in range(60)]
    assert not similar_rows(lk.read_rows(values), 0.5)
    assert len(similar_rows(lk.read_rows(values[:10]), 0.5)) == 9  # too few to tell what a frame is


def test_rows_without_words():
    assert not similar_rows(lk.read_rows([{"text": "!"}, {"text": "?"}, {"text": "a"}]), 0.5)


@pytest.mark.parametrize(("limit", "width"), [(0.3, 2), (0.5, 3), (0.8, 6), (1, 128)])
def test_bands_catch_pairs_at_the_limit(limit, width):
    assert band_width(limit) == width
    assert (1 - limit**width) ** (128 // width) <= 0.01
