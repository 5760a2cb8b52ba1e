"""Adapters with a head for classes: PEFT's SEQ_CLS files in both directions, and their labels."""

import json
import warnings

import pytest
import torch

import lorakit as lk
from lorakit.adapters.attach import attach
from tests.adapters.parity import disturb, peft_load, peft_save, trained
from tests.conftest import LOGITS

IDS = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1))
HEAD = lk.ClassifierConfig(labels=["a", "b", "c"])


def base_of_transformers(path, **options):
    from transformers import AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that score is new
        return AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=3, pad_token_id=0, **options
        ).eval()


def headed(path, config=None, **options):
    torch.manual_seed(0)
    model = lk.load_model(path, dtype="float32", classifier=HEAD, **options)
    attach(model, config or lk.LoraConfig(r=4, lora_alpha=6))
    disturb(trained(model))
    return model


METHODS = {
    "lora": lk.LoraConfig(r=4, lora_alpha=6),
    "dora": lk.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj"]),
    "ia3": lk.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@torch.no_grad()
def test_peft_loads_what_lorakit_wrote(tiny_dir, tmp_path, config):
    ours = headed(tiny_dir, config)
    lk.save_adapter(ours, tmp_path)
    theirs = peft_load(base_of_transformers(tiny_dir), tmp_path)
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_lorakit_loads_what_peft_wrote(tiny_dir, tmp_path):
    """The classes are called LABEL_0 and so on, since PEFT's files say no names."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    theirs = peft.get_peft_model(base_of_transformers(tiny_dir), config).eval()
    disturb({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    peft_save(theirs, tmp_path)
    head = lk.read_classifier(tmp_path)
    assert head.labels == ["LABEL_0", "LABEL_1", "LABEL_2"]
    ours = lk.load_model(tiny_dir, dtype="float32", classifier=head)
    lk.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, rtol=0, atol=LOGITS)
    lk.save_adapter(ours, tmp_path / "again")
    again = peft_load(base_of_transformers(tiny_dir), tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, rtol=0, atol=LOGITS)


@torch.no_grad()
def test_a_merged_head_is_a_model_of_transformers(tiny_dir, tmp_path):
    ours = headed(tiny_dir)
    expected = ours(IDS)
    lk.merge(ours)
    # (W + s B A) x and W x + s B A x round otherwise
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=LOGITS)
    lk.save_model(ours, tmp_path)
    theirs = base_of_transformers(tmp_path)
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=LOGITS)
    assert lk.read_classifier(tmp_path) == HEAD


@torch.no_grad()
def test_a_quantized_base_keeps_its_head_dense(tiny_dir, tmp_path):
    ours = headed(tiny_dir, quantize="nf4")
    lk.save_adapter(ours, tmp_path)
    again = lk.load_model(tiny_dir, dtype="float32", quantize="nf4", classifier=HEAD)
    lk.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), ours(IDS))
    lk.merge(ours, "nf4")
    lk.save_model(ours, tmp_path / "packed", packed=True)
    skipped = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "score" in skipped["quantization_config"]["llm_int8_skip_modules"]
    assert torch.equal(lk.load_model(tmp_path / "packed", dtype="float32")(IDS), ours(IDS))


def test_the_files_say_what_the_head_is(tiny_dir, tmp_path):
    lk.save_adapter(headed(tiny_dir), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert json.loads((tmp_path / "labels.json").read_text()) == {
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
        "problem_type": None,
    }
    assert lk.read_classifier(tmp_path) == HEAD
    card = lk.write_card(tmp_path, base_model=str(tiny_dir)).read_text()
    assert "pipeline_tag: text-classification" in card
    assert "It tells the classes a, b, c." in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card


def test_adapters_of_language_models_have_no_head(tiny_dir, tmp_path):
    lk.save_adapter(lk.attach(lk.load_model(tiny_dir)), tmp_path)
    assert lk.read_classifier(tmp_path) is None
    assert lk.read_classifier(tiny_dir) is None
    assert not (tmp_path / "labels.json").exists()


def test_what_does_not_fit_is_refused(tiny_dir, tmp_path):
    lk.save_adapter(headed(tiny_dir), tmp_path)
    with pytest.raises(lk.LorakitError, match="a head for classes is wanted"):
        lk.load_adapter(lk.load_model(tiny_dir), tmp_path)
    two = lk.load_model(tiny_dir, classifier=lk.ClassifierConfig(labels=["a", "b"]))
    with pytest.raises(lk.LorakitError, match=r"score.weight is \(3, 32\)"):
        lk.load_adapter(two, tmp_path)
    with pytest.raises(lk.LorakitError, match="a learned prompt trains no head"):
        lk.attach(two, lk.PromptTuningConfig(num_virtual_tokens=2))
    (tmp_path / "labels.json").write_text('{"id2label": {"0": "a"}}')
    with pytest.raises(lk.LorakitError, match="has 1 labels, and the head of the adapter 3"):
        lk.read_classifier(tmp_path)


def test_embeddings_are_tied_to_no_head(tiny_dir):
    """So an adapter may change them, and its rows, without asking for it."""
    torch.manual_seed(0)
    model = lk.load_model(tiny_dir, dtype="float32", classifier=HEAD)
    lk.attach(model, lk.LoraConfig(target_modules=["embed_tokens"]))
    before = model(IDS).detach()
    disturb(trained(model))
    assert not torch.equal(model(IDS), before)
