"""The gradient of a step, however its rows are cut into batches."""

import pytest
import torch

from lorakit.adapters.layers.lora import lora_layers
from lorakit.training import run as training_run
from tests.training.runs import run


def test_a_step_is_the_same_however_it_is_cut(tiny_dir, tok, tmp_path, monkeypatch):
    """Micro-batches of 1, 2, 4 and 8 rows, padded or packed, ragged rows: the same gradient, to
    fp32's rounding of sums in another order.
    """
    rows = [{"prompt": "p" * (3 * i + 1), "completion": "c" * (40 - 4 * i)} for i in range(8)]
    found = {}
    real = training_run.backward

    def note(model, step, *rest):
        losses, statistics = real(model, step, *rest)
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found[key] = (sum(each.item() for each in losses) / step.count, torch.cat(grads).double())
        return losses, statistics

    monkeypatch.setattr(training_run, "backward", note)
    for packing in (False, True):
        for size in (1, 2, 4, 8):
            key = (packing, size)
            limit = 48 if packing else 1024
            run(
                tiny_dir, tok, tmp_path / f"{packing}{size}", rows, max_steps=1, packing=packing,
                per_device_train_batch_size=size, max_seq_length=limit,
                gradient_accumulation_steps=8 // size + 8 * packing,
            )  # fmt: skip
    loss, grad = found[False, 1]
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - grad).norm() <= 1e-6 * grad.norm()


def test_accumulation_is_one_large_batch(tiny_dir, tok, tmp_path):
    """8 rows x 1 and 1 row x 8 take the same step, though the rows have different lengths."""
    rows = [{"prompt": "p" * i, "completion": "c" * (3 * i + 1)} for i in range(8)]
    weights, losses = [], []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        model, result = run(
            tiny_dir,
            tok,
            tmp_path,
            rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        losses.append(result.loss)
        weights.append(torch.cat([x.lora_B.flatten() for x in lora_layers(model).values()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)  # fp32 sums in another order
    # a first Adam step is lr * sign(g) wherever g is not tiny: compare where it is not
    moved = weights[0].abs() > 0.5e-2
    assert moved.float().mean() > 0.9
    for other in weights[1:]:
        assert (other - weights[0])[moved].abs().max() < 1e-5
