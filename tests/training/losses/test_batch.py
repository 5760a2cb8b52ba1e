"""The batches of pairs: two rows each, padded or packed."""

import json

import pytest

import lorakit as lk


def test_long_pairs_are_packed_and_scored(tiny_dir, tmp_path):
    """A pair is two rows of max_seq_length at most; the better answer is what is scored."""
    model, tok = lk.attach(lk.load_model(tiny_dir, dtype="float32")), lk.load_tokenizer(tiny_dir)
    pairs = [{"prompt": "p" * 90, "chosen": "b" * 50, "rejected": "c" * 50}] * 3
    config = lk.TrainConfig(
        str(tmp_path), max_steps=2, objective="dpo", packing=True, max_seq_length=64,
        per_device_train_batch_size=1, eval_metrics=["exact_match"],
    )  # fmt: skip
    short = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    result = lk.train(model, tok, {"train": pairs, "validation": short}, config)
    assert result.steps == 2
    assert result.evaluations[-1]["exact_match"] == 0


def test_padding_of_pairs(tiny_dir, tmp_path):
    """Both answers of a pair are rows of the batch, each as long as the longest."""
    tok = lk.load_tokenizer(tiny_dir)
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4))
    pairs = [{"prompt": "ab", "chosen": "x" * 5, "rejected": "y" * 40}] * 4
    config = lk.TrainConfig(str(tmp_path), max_steps=1, objective="dpo")
    lk.train(model, tok, pairs, config)
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    short, long = 3 + 5 + 1, 3 + 40 + 1  # <s> and the end token
    assert json.loads(line)["padding"] == pytest.approx(1 - (short + long) / (2 * long))
