"""Runs with frozen_dtype float8, by the emulation in plain torch; and where they are refused."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.adapters.layers.lora import LowRankLinear
from lorakit.kernels import use_backend
from lorakit.training.float8 import end_float8, start_float8
from tests.conftest import ROWS


def adapted(tiny_dir, quantize="nf4", **options):
    model = lk.load_model(tiny_dir, dtype="bfloat16", quantize=quantize)
    torch.manual_seed(0)
    return lk.attach(model, lk.LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))


def losses(tiny_dir, tok, out, **options):
    model = adapted(tiny_dir)
    config = lk.TrainConfig(output_dir=str(out), max_steps=20, learning_rate=1e-2, **options)
    with use_backend("reference"):
        lk.train(model, tok, {"train": ROWS, "validation": ROWS[:4]}, config)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return model, [line["loss"] for line in lines if "loss" in line], lines[-1]["eval_loss"]


def test_a_run_in_float8_learns_as_one_in_bf16(tiny_dir, tok, tmp_path, capsys):
    _, plain, plain_eval = losses(tiny_dir, tok, tmp_path / "plain")
    assert "float8" not in capsys.readouterr().out
    model, found, found_eval = losses(tiny_dir, tok, tmp_path / "float8", frozen_dtype="float8")
    said = capsys.readouterr().out  # 300 words are no multiple of 16: the head stays as it is
    assert "14 of 14 adapted layers are" in said
    assert found != plain
    # random weights, in rows of 64: the loss moves by more than that of a trained model does
    assert found[0] == pytest.approx(plain[0], rel=0.05)
    assert found[-1] == pytest.approx(plain[-1], rel=0.1)
    assert found_eval == pytest.approx(plain_eval, rel=0.1)
    # nothing of it stays, and the adapter is like any other
    assert model.float8_head is None
    assert all(m.float8 is None for m in model.modules() if isinstance(m, LowRankLinear))
    again = lk.load_adapter(
        lk.load_model(tiny_dir, dtype="bfloat16", quantize="nf4"), tmp_path / "float8"
    )
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_training_is_in_float8_and_evaluation_is_not(tiny_dir, quantize):
    model = adapted(tiny_dir, quantize)
    ids = torch.arange(24)[None]
    with use_backend("reference"), torch.no_grad():
        plain = [float(model.train(mode).loss(ids, ids)[0]) for mode in (True, False)]
        start_float8(model)
        found = [float(model.train(mode).loss(ids, ids)[0]) for mode in (True, False)]
        end_float8(model)
        after = float(model.train().loss(ids, ids)[0])
    assert found[0] != plain[0]
    assert found[0] == pytest.approx(plain[0], rel=0.05)
    assert found[1] == plain[1]
    assert after == plain[0]


def test_what_stays_in_the_models_dtype(tiny_dir):
    """Layers without an adapter, and a head that is trained."""
    model = adapted(tiny_dir, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    with use_backend("reference"):
        assert "4 of 4 adapted layers are" in start_float8(model)
    assert model.float8_head is None


def test_checkpointing_has_the_same_bits(tiny_dir):
    found = []
    for checkpointing in (False, True):
        model = adapted(tiny_dir).train()
        model.gradient_checkpointing = checkpointing
        with use_backend("reference"):
            start_float8(model)
            ids = torch.arange(24)[None]
            model.loss(ids, ids)[0].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_device_without_float8(tiny_dir, tok, tmp_path):
    config = lk.TrainConfig(output_dir=str(tmp_path), frozen_dtype="float8")
    with pytest.raises(lk.LorakitError, match=r"compute capability 8\.9 .* is on cpu"):
        lk.train(adapted(tiny_dir), tok, ROWS, config)


def test_a_model_in_fp32(tiny_dir, tok, tmp_path):
    model = lk.attach(lk.load_model(tiny_dir, dtype="float32"), lk.LoraConfig(r=4))
    config = lk.TrainConfig(output_dir=str(tmp_path), frozen_dtype="float8")
    with use_backend("reference"), pytest.raises(lk.LorakitError, match="bfloat16 model"):
        lk.train(model, tok, ROWS, config)


def test_dpo():
    with pytest.raises(lk.LorakitError, match="objective dpo, which compares"):
        lk.TrainConfig(frozen_dtype="float8", objective="dpo")
    assert lk.TrainConfig(frozen_dtype="float8", objective="orpo").frozen_dtype == "float8"
