"""BERTScore: the formula is bert-score's own, over the same hidden states."""

from collections import defaultdict
from math import log

import pytest
import torch

import lorakit as lk

PREDICTIONS = ["the cat sat", "one two", "a", "", "two dogs ran away"]
REFERENCES = ["the cat sat down", "two one two", "b", "x", "dogs ran"]


@pytest.fixture(scope="module")
def model(tiny_dir):
    return lk.load_model(tiny_dir, dtype="float32")


def of_transformers(tiny_dir, tok, texts, layer):
    """The hidden states of transformers' model after a layer, without BOS, and their tokens."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    ids = [tok.encode(text) for text in texts]
    with torch.no_grad():
        all_of = [theirs(torch.tensor([row]), output_hidden_states=True) for row in ids]
    states = [found.hidden_states[-1 if layer is None else layer][0, 1:] for found in all_of]
    return list(zip(states, [row[1:] for row in ids], strict=True))


@pytest.mark.parametrize(("layer", "idf"), [(None, False), (1, False), (1, True)])
def test_numbers_are_those_of_bert_score(tiny_dir, model, tok, layer, idf):
    """Pair by pair: in a batch its padding counts as a token that is unlike any other by 0."""
    utils = pytest.importorskip("bert_score.utils")
    found = lk.bert_score(model, tok, PREDICTIONS, REFERENCES, layer=layer, idf=idf, batch_size=2)
    weights = idf_of(REFERENCES, tok) if idf else defaultdict(lambda: 1.0)
    sides = [of_transformers(tiny_dir, tok, texts, layer) for texts in (PREDICTIONS, REFERENCES)]
    for number, (prediction, reference) in enumerate(zip(*sides, strict=True)):
        ours = [each[number] for each in found]
        if not PREDICTIONS[number]:
            assert ours == [0, 0, 0]
            continue
        inputs = []
        for states, ids in (reference, prediction):
            scale = torch.tensor([[weights[token] for token in ids]])
            inputs += [states[None].clone(), torch.ones(1, len(ids)), scale]
        theirs = utils.greedy_cos_idf(*inputs)
        # cosines of fp32 hidden states of two implementations
        assert ours == pytest.approx([each.item() for each in theirs], abs=2e-5)


def idf_of(references, tok):
    """The weights of bert-score's get_idf_dict, from its definition."""
    counts = defaultdict(int)
    for text in references:
        for token in set(tok.encode(text)):
            counts[token] += 1
    found = defaultdict(lambda: log(len(references) + 1))
    found.update({t: log((len(references) + 1) / (n + 1)) for t, n in counts.items()})
    return found


def test_a_text_is_most_like_itself_and_a_baseline_rescales(model, tok):
    found = lk.bert_score(model.train(), tok, REFERENCES, REFERENCES)
    assert model.training
    for each in found:
        assert each.tolist() == pytest.approx([1] * 5, abs=1e-6)
    plain = lk.bert_score(model, tok, PREDICTIONS, REFERENCES)
    scaled = lk.bert_score(model, tok, PREDICTIONS, REFERENCES, baseline=(0.5, 0.2, 0.4))
    for one, other, floor in zip(plain, scaled, (0.5, 0.2, 0.4), strict=True):
        torch.testing.assert_close(other, (one - floor) / (1 - floor))
    assert not model.model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, "layer is 3; the model has layers 1 to 2"),
        ({"layer": 0}, "layer is 0; the model has layers 1 to 2"),
        ({"baseline": (0.1, 1.0, 0.2)}, r"baseline is \(0.1, 1.0, 0.2\); each must be below 1"),
        ({"predictions": ["a" * 99]}, "a text has 100 tokens; the model reads 64"),
        ({"predictions": []}, "0 predictions and 1 references"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_what_is_refused(model, tok, options, message):
    options = {"predictions": ["a"], "references": ["b"], **options}
    with pytest.raises(lk.LorakitError, match=message):
        lk.bert_score(model, tok, **options)
