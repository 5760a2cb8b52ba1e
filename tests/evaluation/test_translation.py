"""BLEU and chrF are sacrebleu's own numbers, and the sums over rows give the same."""

import builtins

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.evaluation import translation

sacrebleu = pytest.importorskip("sacrebleu")

texts = st.lists(
    st.sampled_from(["the", "cat", "sat.", "on", "Émile's", "mat,", "12.5", "!"]), max_size=9
).map(" ".join)
rows = st.lists(st.tuples(texts, texts), min_size=1, max_size=6)


@given(rows)
def test_the_score_of_a_list_is_sacrebleus(rows):
    predictions, references = map(list, zip(*rows, strict=True))
    scores = lk.metrics.score(predictions, references, ["bleu", "chrf"])
    assert scores == {
        "bleu": sacrebleu.corpus_bleu(predictions, [references]).score,
        "chrf": sacrebleu.corpus_chrf(predictions, [references]).score,
    }


@given(rows)
def test_the_score_of_the_sums_of_rows_is_sacrebleus(rows):
    predictions, references = map(list, zip(*rows, strict=True))
    of_bleu = translation.bleu_counts(predictions, references).sum(0)
    of_chrf = translation.chrf_counts(predictions, references).sum(0)
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    # one fp64 exponential and logarithm more or less
    assert translation.bleu_value(of_bleu).item() == pytest.approx(expected, rel=1e-12)
    expected = sacrebleu.corpus_chrf(predictions, [references]).score
    assert translation.chrf_value(of_chrf).item() == pytest.approx(expected, rel=1e-12)


def test_nothing_written_scores_nothing():
    counts = translation.bleu_counts(["", ""], ["a b", "c"])
    assert translation.bleu_value(counts.sum(0)) == 0
    assert translation.chrf_value(torch.zeros(18, dtype=torch.float64)) == 0


def test_without_sacrebleu_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **options):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(lk.LorakitError, match=r"need sacrebleu; pip install 'lorakit\[metrics\]'"):
        lk.metrics.score(["a"], ["a"], "bleu")
    assert lk.metrics.score(["a"], ["a"], "accuracy") == {"accuracy": 1}
