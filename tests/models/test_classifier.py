"""Models with a head for classes against transformers' own, as files and as logits."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorakit as lk
from lorakit.models.classifier import Score, decoder_of, is_tied, last_tokens
from tests.conftest import LOGITS, TINY, randomize, write_tokenizer

LABELS = {0: "bad", 1: "good", 2: "so-so"}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12, "num_key_value_heads": 2},
    "gemma": {"head_dim": 12, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 12, "sliding_window": 6, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 12, "sliding_window": 6},
}
# three rows, their real tokens first, and the padding token at a place that counts and as padding
IDS = torch.randint(10, 97, (3, 12), generator=torch.Generator().manual_seed(1))
LENGTHS = [12, 7, 9]


def theirs(model_type, pad_token_id=3, dtype=torch.float32, **more):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    settings = {**TINY, **FAMILIES.get(model_type, {}), "pad_token_id": pad_token_id}
    config = AutoConfig.for_model(model_type, **settings, id2label=LABELS, **more)
    config.label2id = {name: i for i, name in LABELS.items()}
    model = AutoModelForSequenceClassification.from_config(
        config, dtype=dtype, attn_implementation="eager"
    ).eval()
    randomize(model, model_type)
    return model


def padded(pad=3):
    ids = IDS.clone()
    mask = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    ids[~mask] = pad
    ids[1, 6] = pad  # the row ends with it, as rows do whose end token is the padding
    return ids, mask


def packed(ids, mask):
    rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    return torch.cat(rows)[None], bounds.to(torch.int32)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    theirs("llama").save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_logits_are_transformers_padded_and_packed(model_type, tmp_path, differences):
    model = theirs(model_type)
    model.save_pretrained(tmp_path)
    ours = lk.load_model(tmp_path, dtype="float32")
    assert isinstance(ours, lk.Classifier)
    assert ours.classifier.labels == list(LABELS.values())
    ids, mask = padded()
    expected = model(ids, attention_mask=mask).logits
    found = ours(ids, attention_mask=mask)
    differences(model_type, "classifier", (found - expected).abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)
    row, bounds = packed(ids, mask)
    torch.testing.assert_close(ours(row, cu_seqlens=bounds), expected, rtol=0, atol=LOGITS)
    # what a run gives: positions from the host, and no mask, since padding lies in the future
    rows = [each[keep].tolist() for each, keep in zip(ids, mask, strict=True)]
    last = last_tokens(rows, 3, 12)
    torch.testing.assert_close(ours(ids, last=last), expected, rtol=0, atol=LOGITS)
    last = last_tokens(rows, 3, None)
    found = ours(row, cu_seqlens=bounds, last=last)
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_padding_on_the_left_is_no_other_row(directory):
    model, ours = theirs("llama"), lk.load_model(directory, dtype="float32")
    ids, mask = padded()
    for row, length in enumerate(LENGTHS):
        ids[row] = ids[row].roll(12 - length)
        mask[row] = mask[row].roll(12 - length)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours(ids, attention_mask=mask), expected, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_without_a_padding_token_the_last_token_is_read(tmp_path):
    model = theirs("llama", pad_token_id=None)
    model.save_pretrained(tmp_path)
    ours = lk.load_model(tmp_path, dtype="float32")
    expected = torch.cat([model(row[None]).logits for row in IDS])
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=LOGITS)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from([None, 0, 3]),
)
def test_the_host_and_the_device_read_the_same_tokens(rows, padding):
    config = lk.ModelConfig("llama", 8, 8, 8, 1, 1, 1, 8, pad_token_id=padding,
                            classifier=lk.ClassifierConfig(labels=["a", "b"]))  # fmt: skip
    with torch.device("meta"):
        model = decoder_of(config)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
    assert torch.equal(model._last(ids, mask, None), last_tokens(rows, padding, longest))
    bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
    row = torch.tensor([[token for each in rows for token in each]])
    assert torch.equal(model._last(row, None, bounds), last_tokens(rows, padding, None))


@torch.no_grad()
def test_a_saved_model_is_one_of_transformers(directory, tmp_path):
    from transformers import AutoModelForSequenceClassification

    ours = lk.load_model(directory, dtype="float32")
    lk.save_model(ours, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(again).__name__ == "LlamaForSequenceClassification"
    assert again.config.id2label == LABELS
    ids, mask = padded()
    found = again(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, ours(ids, attention_mask=mask), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen3"])
def test_the_class_of_a_family_is_there_in_transformers(model_type, tmp_path):
    import transformers

    theirs(model_type).save_pretrained(tmp_path)
    written = lk.load_model(tmp_path).config.to_hf()
    before = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == before["architectures"]
    assert hasattr(transformers, written["architectures"][0])
    assert written["label2id"] == {name: i for i, name in LABELS.items()}


def test_a_language_model_gets_a_head(tiny_dir):
    """It is drawn by torch's generator, stays in fp32, and takes the place of lm_head."""
    head = lk.ClassifierConfig(labels=["no", "yes"])
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(lk.load_model(tiny_dir, quantize="nf4", classifier=head))
    first, second = models
    assert isinstance(first.score, Score)
    assert first.score.weight.dtype == torch.float32
    assert torch.equal(first.score.weight, second.score.weight)
    assert 0.015 < first.score.weight.std() < 0.025  # of 64 numbers with a deviation of 0.02
    assert first.lm_head is None
    assert not is_tied(first)
    assert first.to(torch.bfloat16).score.weight.dtype == torch.float32
    outputs = first(torch.tensor([[5, 6, 7]]))
    assert outputs.shape == (1, 2)
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "a row has one label here"),
        ({"id2label": {"0": "a", "2": "b"}}, "number the labels from 0 on"),
        ({"id2label": ["a"]}, "id2label must be a mapping"),
        ({"id2label": {"0": "a", "1": "a"}}, "'a' is there twice"),
        ({"id2label": {"0": "a", "1": "b"}}, "the config asks for"),  # the files have three
        ({"problem_type": "regression"}, "regression has one output, and there are 3"),
        ({"id2label": None, "num_labels": -1}, "num_labels must be a positive number"),
        ({"architectures": ["LlamaForCausalLM"]}, "lm_head.weight is missing"),
    ],
)
def test_damaged_labels_are_refused(directory, tmp_path, changes, message):
    import shutil

    path = shutil.copytree(directory, tmp_path / "copy")
    values = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(lk.LorakitError, match=message):
        lk.load_model(path)


def test_a_head_is_not_given_twice(directory):
    with pytest.raises(lk.LorakitError, match="has a head for classes, bad, good, so-so"):
        lk.load_model(directory, classifier=lk.ClassifierConfig())


def test_what_needs_tokens_is_refused(directory, tmp_path):
    model, tok = lk.load_model(directory, dtype="float32"), lk.load_tokenizer(directory)
    row = torch.tensor([[5, 6, 7]])
    for wrong in (
        lambda: lk.generate(model, tok, "a", max_new_tokens=2),
        lambda: model.loss(row, row),
        lambda: model.head(torch.zeros(1, 3, 32)),
        lambda: lk.export_gguf(model, tmp_path / "m.gguf"),
        lambda: lk.export_gguf(directory, tmp_path / "m.gguf"),
    ):
        with pytest.raises(lk.LorakitError, match="it tells no next token"):
            wrong()
    assert not (tmp_path / "m.gguf").exists()
