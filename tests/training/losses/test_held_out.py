"""Runs that learn to prefer, by the loss of held-out pairs."""

import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import lora_layers
from lorakit.data.batching import collate
from lorakit.training.losses.held_out import held_out_loss
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


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_the_loss_of_held_out_pairs_is_the_mean_of_the_objective(tiny_dir, objective):
    """Pair by pair, without what a run does beside it: dropout, packing, label smoothing."""
    model, tok = lk.load_model(tiny_dir, dtype="float32"), lk.load_tokenizer(tiny_dir)
    torch.manual_seed(0)
    lk.attach(model, lk.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)
    smoothing = 0.3 if objective == "dpo" else 0.0
    config = lk.TrainConfig(
        objective=objective, packing=True, label_smoothing_factor=smoothing, beta=0.3
    )
    examples = lk.encode_rows(lk.read_rows(PAIRS[:5]), tok, max_seq_length=64)
    model.train()
    found = held_out_loss(model, examples, 2, config, None)
    assert model.training
    model.eval()
    losses, right = [], 0
    for pair in examples:
        ids, labels = collate([pair.chosen, pair.rejected])
        loss, prefers = lk.pair_losses(model, ids, labels, objective=objective, beta=0.3)
        losses.append(loss.item())
        right += prefers.item()
    # fp32, with batches of other sizes
    assert found["loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert (found["preference_accuracy"], found["rows"]) == (right / 5, 5)
