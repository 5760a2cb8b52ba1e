"""Forecasts of divided weights and of weights in host memory."""

import json
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.training.memory_plan import elsewhere
from tests import programs

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
TINY = lk.ModelConfig("llama", 512, 128, 256, 2, 4, 2, 32)
LLAMA_70B = lk.ModelConfig("llama", 128256, 8192, 28672, 80, 64, 8, 128)
EVERY_SAVING = lk.TrainConfig(
    per_device_train_batch_size=1,
    max_seq_length=2048,
    gradient_checkpointing=True,
    activation_offloading=True,
    mlp_activations="recompute",
    optim="adamw_8bit",
)
ENDS = lk.QuantConfig(embed_tokens="nf4", lm_head="nf4")
WEIGHTS = ("packed weights", "scales", "embeddings", "head")


@pytest.fixture(autouse=True, scope="module")
def _no_process_stays():
    yield
    elsewhere.end()


def plan(**options):
    train = lk.TrainConfig(per_device_train_batch_size=1, max_seq_length=64)
    return lk.plan_memory(TINY, quantize="nf4", lora=lk.LoraConfig(r=8), train=train, **options)


@pytest.mark.slow
def test_pretended_ranks_gather_what_real_ones_do(tmp_path):
    """They are equal to the byte, as both run FSDP2, one with gloo and numbers, one without."""
    done = programs.run(["-m", "tests.training.memory_plan.gathering", tmp_path], cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["real"]) == 5
    assert min(found["real"].values()) > 0
    assert found["pretended"] == found["real"]


def test_what_is_held_between_two_steps():
    """Half of the weights on each of two ranks; and on a device whose weights wait on the host,
    none of them. The offset of double quantization, 4 bytes a layer, is no half."""
    whole, half = plan(), plan(ranks=2, shard="full")
    waiting = plan(offload_weights=True)
    assert not hasattr(torch, "meta")  # torch is changed in the other process alone
    assert not torch.distributed.is_initialized()
    for kind in WEIGHTS:
        assert half.resident[kind] == pytest.approx(whole.resident[kind] / 2, abs=64)
    weights = sum(whole.resident[kind] for kind in WEIGHTS)
    assert not {*WEIGHTS} & {*waiting.resident}
    assert waiting.host == pytest.approx(weights + whole.resident["weights"], rel=0.01)
    assert half.host == 0
    for found in (half, waiting):
        assert found.at_peak["gathered weights"] > 0
        assert "gathered weights" not in found.resident


def test_a_sum_over_ranks_takes_two_buffers():
    """gradients.py: a model of few adapters has them as large as these are."""
    adapters = plan().resident["adapters"]
    for shard in ("none", "full"):
        sums = plan(ranks=2, shard=shard).resident["gradients"]
        assert sums == pytest.approx(2 * adapters, rel=0.01)


def test_what_the_other_process_raises_is_raised_here():
    lora = lk.LoraConfig(r=8, target_modules=["no_such_layer"])
    with pytest.raises(lk.LorakitError, match="no_such_layer"):
        lk.plan_memory(TINY, lora=lora, ranks=2, shard="full")
    with pytest.raises(lk.LorakitError, match="ranks is 0"):
        plan(ranks=0)
    full = lk.TrainConfig(train="full", per_device_train_batch_size=1)
    with pytest.raises(lk.LorakitError, match="cannot wait in host memory"):
        lk.plan_memory(TINY, train=full, offload_weights=True)


def test_full_training_of_divided_weights():
    """Half of the weights and of AdamW's state on each of two ranks, and no gradients between."""
    full = lk.TrainConfig(train="full", per_device_train_batch_size=1, max_seq_length=64)
    whole, half = (
        lk.plan_memory(TINY, train=full, device="cpu", ranks=2, shard=shard)
        for shard in ("none", "full")
    )
    for kind in ("trained weights", "optimizer state"):
        # the last norm, of 128 values, is whole
        assert half.resident[kind] == pytest.approx(whole.resident[kind] / 2, rel=0.01)
    assert half.resident.get("gradients", 0) <= 4096
    assert half.at_peak["gathered weights"] > 0
    assert half.peak < whole.peak


def test_a_process_that_has_ended_is_said_and_replaced():
    first = plan(offload_weights=True)
    elsewhere._helper.process.kill()
    elsewhere._helper.process.wait()
    with pytest.raises(RuntimeError, match="has ended"):
        plan(offload_weights=True)
    again = plan(offload_weights=True)
    assert again.peak == pytest.approx(first.peak, rel=1e-3)  # garbage may be collected later


def test_an_interrupted_question_ends_the_process(monkeypatch):
    """Its answer would come when the next question is asked."""

    class Interrupted:
        ended = False

        def is_mine(self):
            return True

        def ask(self, setting):
            raise KeyboardInterrupt

        def end(self):
            self.ended = True

    helper = Interrupted()
    monkeypatch.setattr(elsewhere, "_helper", helper)
    with pytest.raises(KeyboardInterrupt):
        elsewhere.forecast_elsewhere(None)
    assert helper.ended
    assert elsewhere._helper is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "gigabytes"),
    [
        ({"ranks": 2, "shard": "full"}, 23.3),
        ({}, 43),
        ({"offload_weights": True}, 6),
    ],
    ids=["two of 24", "one of 48", "weights on the host"],
)
def test_a_70b_with_every_saving(options, gigabytes):
    found = lk.plan_memory(
        LLAMA_70B, quantize=ENDS, lora=lk.LoraConfig(r=16), train=EVERY_SAVING, **options
    )
    print(options, f"{found.peak / 1e9:.2f} GB", f"host {found.host / 1e9:.2f}", found.at_peak)
    assert found.peak <= gigabytes * 1e9
