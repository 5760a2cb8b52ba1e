"""What a head for classes is scored by, against scikit-learn's and numpy's numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.evaluation.classes import _macro_f1, _number_scores
from tests.training.runs import PAIRS


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_the_definition(pairs):
    """F1 of a class is 2 TP / (2 TP + FP + FN); scikit-learn averages over the classes there."""
    said, wanted = (torch.tensor(each) for each in zip(*pairs, strict=True))
    scores = []
    for c in sorted({c for pair in pairs for c in pair}):
        right = sum(a == b == c for a, b in pairs)
        wrong = sum((a == c) != (b == c) for a, b in pairs)
        scores.append(2 * right / (2 * right + wrong))
    assert _macro_f1(said, wanted, 5) == pytest.approx(np.mean(scores))


def test_numbers_are_scored_as_numpy_does():
    torch.manual_seed(0)
    said, wanted = torch.randn(2, 9, dtype=torch.float64)
    found = _number_scores(said, wanted)
    assert found["loss"] == pytest.approx(np.mean((said.numpy() - wanted.numpy()) ** 2))
    assert found["pearson"] == pytest.approx(np.corrcoef(said, wanted)[0, 1])
    assert _number_scores(torch.zeros(3), torch.arange(3.0))["pearson"] == 0


@pytest.fixture(scope="module")
def tok(tiny_dir):
    return lk.load_tokenizer(tiny_dir)


@pytest.fixture(scope="module")
def model(tiny_dir):
    torch.manual_seed(0)
    head = lk.ClassifierConfig(labels=["no", "yes", "maybe"])
    return lk.load_model(tiny_dir, dtype="float32", classifier=head)


CHAT = [{"role": "user", "content": "Is it?"}]


def test_predictions_are_what_transformers_pipeline_says(model, tok, tmp_path):
    """A text has the tokens of the tokenizer alone, a chat those of the template."""
    from transformers import AutoTokenizer, pipeline

    lk.save_model(model, tmp_path)
    texts = ["is it so?", "no", "never again, I think"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), tokenizer=tokenizer, top_k=None)
    found = lk.predict(model, tok, texts, batch_size=2)
    for text, ours in zip(texts, found, strict=True):
        [said] = classify([text])
        theirs = {each["label"]: each["score"] for each in said}
        assert ours.scores == pytest.approx(theirs, abs=1e-5)
        assert ours.label == max(theirs, key=theirs.get)
        assert ours.score == ours.scores[ours.label]
    rows = [CHAT, {"messages": CHAT}, {"prompt": CHAT}, {"messages": CHAT, "label": "no"}]
    shown = tok.apply_chat_template(CHAT, tokenize=False)
    ids = tok.encode(shown, add_special_tokens=False)
    expected = model(torch.tensor([ids])).softmax(-1)[0].tolist()
    for each in lk.predict(model, tok, rows):
        assert list(each.scores.values()) == pytest.approx(expected, abs=1e-6)


def test_rows_that_are_too_long_are_cut(model, tok):
    """Text at its end, as transformers cuts it, and a chat at its start but for the BOS token."""
    [ours] = lk.predict(model, tok, ["abcdefghij"], max_seq_length=6)
    ids = tok.encode("abcdefghij")[:6]
    assert list(ours.scores.values()) == pytest.approx(
        model(torch.tensor([ids])).softmax(-1)[0].tolist(), abs=1e-6
    )
    [ours] = lk.predict(model, tok, [CHAT], max_seq_length=6)
    ids = tok.encode(tok.apply_chat_template(CHAT, tokenize=False), add_special_tokens=False)
    ids = ids[:1] + ids[-5:]
    assert list(ours.scores.values()) == pytest.approx(
        model(torch.tensor([ids])).softmax(-1)[0].tolist(), abs=1e-6
    )


def test_nothing_is_predicted_of_nothing(model, tok, tiny_dir):
    assert lk.predict(model, tok, []) == []
    for rows, message in [
        ("text", "put it into a list"),
        ([{"chosen": "a", "rejected": "b"}], "row 0"),
        ([3], "row 0 must be text"),
        ([""], "row 0"),
    ]:
        with pytest.raises(lk.LorakitError, match=message):
            lk.predict(model, tok, rows)
    with pytest.raises(lk.LorakitError, match="a head for classes is wanted"):
        lk.predict(lk.load_model(tiny_dir), tok, ["a"])


def test_metrics_of_completions_are_refused(model, tok):
    with pytest.raises(lk.LorakitError, match="makes none; its accuracy comes without asking"):
        lk.evaluate(model, tok, [{"text": "a", "label": "no"}], metrics=["accuracy"])


@torch.no_grad()
def test_a_reward_model_is_scored_by_pairs(tiny_dir, tok):
    torch.manual_seed(0)
    model = lk.load_model(tiny_dir, dtype="float32", classifier=lk.ClassifierConfig())
    rows = [{**pair, "margin": 0.5} for pair in PAIRS]
    result = lk.evaluate(model, tok, rows, batch_size=5)
    ahead, rewards = [], []
    for pair in lk.encode_rows(rows, tok, max_seq_length=64):
        better, worse = (model(torch.tensor([each.input_ids])).item() for each in pair.answers)
        ahead.append(better - worse)
        rewards += [better, worse]
        assert pair.margin == 0.5
    assert result["reward_margin"] == pytest.approx(np.mean(ahead), abs=1e-6)
    assert result["preference_accuracy"] == np.mean(np.array(ahead) > 0)
    assert result["loss"] == pytest.approx(np.mean(np.log1p(np.exp(0.5 - np.array(ahead)))))
    assert result["rows"] == len(PAIRS)
    answers = [(pair["prompt"], pair[name]) for pair in PAIRS for name in ("chosen", "rejected")]
    asked = [{"prompt": prompt, "completion": answer} for prompt, answer in answers]
    for texts in (asked, ["".join(each) for each in answers]):
        found = [each.score for each in lk.predict(model, tok, texts)]
        assert found == pytest.approx(rewards, abs=1e-6)  # at the same token, the end token
