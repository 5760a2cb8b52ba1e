"""ROUGE-L against its definition."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk

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
