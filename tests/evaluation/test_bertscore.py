"""BERTScore: the formula is bert-score's own, over the same hidden states."""

import sys
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


# ---- encoders ----

WORDS = ["the", "cat", "sat", "down", "one", "two", "a", "b", "x", "dogs", "ran", "away", "##s"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder_dir(request, tmp_path_factory):
    """A tiny random encoder, as its files lie on the Hub."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp(request.param)
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 24,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (path / "vocab.txt").write_text("\n".join(special + WORDS) + "\n", encoding="utf-8")
        tok = transformers.BertTokenizer(str(path / "vocab.txt"), model_max_length=16)
        config = transformers.BertConfig(vocab_size=len(tok), **sizes)
        model = transformers.BertModel(config)
    else:
        from tokenizers.pre_tokenizers import ByteLevel

        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocab = {t: i for i, t in enumerate([*special, *sorted(ByteLevel.alphabet())])}
        tok = transformers.RobertaTokenizer(vocab, [], model_max_length=16)
        config = transformers.RobertaConfig(vocab_size=len(tok), pad_token_id=1, **sizes)
        model = transformers.RobertaModel(config)
    tok.save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(("layer", "idf"), [(2, False), (2, True), (3, False)])
def test_numbers_of_an_encoder_are_those_of_bert_score(encoder_dir, layer, idf):
    """Pair by pair, by its own tokens, states and weights, truncation included."""
    utils = pytest.importorskip("bert_score.utils")
    predictions = [" the cat sat ", "one two", "a", "", "two dogs ran away", "cat " * 30]
    references = ["the cat sat down", "two one two", "b", "x", "dogs ran", "the cats ran"]
    encoder = lk.load_encoder(encoder_dir)
    options = {"layer": layer, "idf": idf, "batch_size": 4}
    found = lk.bert_score(encoder, None, predictions, references, **options)
    model = utils.get_model(str(encoder_dir), layer)
    # what bert-score asks of RoBERTa's tokenizer in each call, and transformers 5 lost
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        encoder_dir, add_prefix_space=True
    )
    weights = defaultdict(lambda: 1.0)
    if idf:
        weights = utils.get_idf_dict(references, tok, nthreads=0)
    weights[tok.cls_token_id] = weights[tok.sep_token_id] = 0
    assert not found.f1[3]
    for number in (0, 1, 2, 4, 5):
        pair = [references[number]], [predictions[number]]
        theirs = utils.bert_cos_score_idf(model, *pair, tok, weights, device="cpu")[0]
        ours = [each[number].item() for each in found]
        # the same model in batches of other widths: some units of fp32
        assert ours == pytest.approx(theirs.tolist(), abs=1e-5)


def test_an_encoder_that_cannot_be_read_is_told(encoder_dir, model, monkeypatch, tmp_path):
    from lorakit.evaluation.encoder import is_encoder

    assert is_encoder(encoder_dir)
    assert not is_encoder(model.source.path)
    with pytest.raises(lk.LorakitError, match="layer is 4; the model has layers 1 to 3"):
        lk.bert_score(lk.load_encoder(encoder_dir), None, ["a"], ["b"], layer=4)
    with pytest.raises(lk.LorakitError, match="tok is the tokenizer of the model"):
        lk.bert_score(model, None, ["a"], ["b"])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(lk.LorakitError, match="transformers cannot read this encoder"):
        lk.load_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(lk.LorakitError, match=r"pip install 'lorakit\[eval\]'"):
        lk.load_encoder(encoder_dir)
