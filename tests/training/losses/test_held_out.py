"""Runs that learn to prefer, by the loss of held-out pairs."""

import pytest
import torch

import lorakit as lk
from tests.training.runs import PAIRS


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_run_learns_to_prefer(tiny_dir, tmp_path, objective, packing):
    model, tok = (
        lk.load_model(tiny_dir, dtype="float32", quantize="nf4"),
        lk.load_tokenizer(tiny_dir),
    )
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8))
    config = lk.TrainConfig(
        str(tmp_path), max_steps=30, learning_rate=1e-2, objective=objective, packing=packing,
        max_seq_length=64, eval_steps=15, save_steps=20,
    )  # fmt: skip
    result = lk.train(model, tok, {"train": PAIRS, "validation": PAIRS[:6]}, config)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["loss"] < first["loss"]
    assert last["preference_accuracy"] == 1
    assert last["rows"] == 6
