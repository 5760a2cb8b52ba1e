"""What a run says of its memory before it starts, and when it is refused."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch

import lorakit as lk
from lorakit.evaluation.share import Share
from lorakit.models.decoder import Decoder
from lorakit.training.memory_plan import before, planned
from lorakit.training.memory_plan.before import MARGIN, surely_fits
from lorakit.training.ranks import Ranks
from tests.training.memory_plan.arithmetic import CONFIG, needs, run

GB = 10**9


def test_a_small_run_needs_no_forecast(forecasts):
    assert lk.check_memory(run(device="cpu"), 10**12) == ""
    assert not forecasts


def test_what_surely_fits_is_far_below_the_memory():
    """The bound counts each weight 12 bytes, so what fits has four times its room."""
    weights = sum(p.numel() for p in Decoder(CONFIG).parameters())
    memory = 4 * 10**9
    assert surely_fits(run(lengths=[100, 7]), memory)
    assert not surely_fits(run(), 48 * weights)
    for more in (
        run(max_seq_length=1 << 14),
        run(per_device_train_batch_size=1 << 12),
        run(gradient_accumulation_steps="auto", per_device_train_batch_size=1 << 12),
        run(lora=lk.LoraConfig(r=1 << 16)),
        dataclasses.replace(run(), lora=None),
    ):
        assert not surely_fits(more, memory)


def test_a_teacher_counts(monkeypatch):
    """Its weights count 12 bytes too, and four times that is more than there is."""
    larger = dataclasses.replace(CONFIG, hidden_size=30 * CONFIG.hidden_size)
    with torch.device("meta"):
        memory = 48 * sum(p.numel() for p in Decoder(larger).parameters())
    monkeypatch.setattr("lorakit.training.memory_plan.plan.model_config", lambda model: larger)
    for settings, fits in (({"logits": "file"}, True), ({"teacher": "another"}, False)):
        distillation = lk.DistillationConfig(**settings)
        given = run(lengths=[9], objective="distillation", distillation=distillation)
        assert surely_fits(given, memory) == fits


@pytest.mark.usefixtures("forecasts")
def test_the_line_and_the_refusal():
    big = run(mlp_activations="keep", per_device_train_batch_size=8)
    peak, reserved = big.forecast().peak, needs(big)
    line = lk.check_memory(big, 4 * reserved)
    assert line == "memory: needs 1.1 of 4.4 MB, most in backward"
    assert lk.check_memory(big, reserved) == "memory: needs 1.1 of 1.1 MB, most in backward"
    assert lk.check_memory(big, peak).endswith("; this is tight, and may fail")
    assert lk.check_memory(big, round(peak / MARGIN) + 1).endswith("; this is tight, and may fail")
    with pytest.raises(lk.LorakitError) as caught:
        lk.check_memory(big, round(peak / MARGIN) - 1)
    assert str(caught.value) == (
        "the run needs 1.1 MB of memory, and 1.1 MB are free: with per_device_train_batch_size=4 "
        "gradient_accumulation_steps=2 it needs 907 kB"
    )
    with pytest.raises(lk.LorakitError, match="take a smaller model or shorter rows .the least is"):
        lk.check_memory(big, 1000)
    cpu = dataclasses.replace(big, device="cpu")
    assert lk.check_memory(cpu, reserved).endswith("; the process takes 1.6 to 2.5 times that")


@pytest.mark.usefixtures("forecasts")
def test_what_waits_in_host_memory_must_fit_there_too():
    """A quarter of a MB of packed weights waits there, which `arithmetic` says."""
    waiting = dataclasses.replace(run(mlp_activations="keep"), offload_weights=True)
    plan = waiting.forecast()
    assert plan.host == 250_000
    assert "host memory" in lk.check_memory(waiting, plan.reserved, 250_000)
    lk.check_memory(waiting, plan.reserved)  # nobody knows how much there is
    with pytest.raises(lk.LorakitError) as caught:
        lk.check_memory(waiting, plan.reserved, 200_000)
    assert str(caught.value) == (
        "the run needs 250 kB of host memory beside the GPU's, and 200 kB are free: leave out "
        "offload_weights"
    )
    whole = dataclasses.replace(waiting, offload_weights=False)
    least = lk.settings_that_fit(whole, 1, host=50_000)  # of packed ends too, 100 kB would wait
    assert "offload_weights" not in least.settings
    below = least.run.forecast().reserved - 1
    assert "offload_weights" in lk.settings_that_fit(whole, below, host=250_000).settings


@pytest.mark.parametrize("divided", [False, True])
def test_one_process_of_a_run_asks_for_the_one_that_has_the_least(divided, forecasts, monkeypatch):
    """Two of the three are on this machine, and share its memory; one elsewhere has less."""

    @contextmanager
    def joined(device):
        yield Three()

    class Three(Ranks):
        size, on_machine = 3, 2
        share = Share(0, 3, lambda mine: [*mine, 10 * GB, 6 * GB])

    config = lk.RunConfig(model="no/model", data={"train": "-"}, shard="full")
    monkeypatch.setattr(before, "joined", joined)
    monkeypatch.setattr(before, "own_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(before, "free_memory", lambda device: 16 * GB)
    monkeypatch.setattr(before, "surely_fits", lambda run, memory: False)
    assert " of 6.0 GB, most in backward" in lk.check_run(config, [20], divided=divided)
    assert {made["ranks"] for made in forecasts} == {3}
    assert {made["shard"] for made in forecasts} == {"full" if divided else "none"}


@pytest.mark.parametrize("error", [lk.LorakitError("no config"), RuntimeError("a\nb"), KeyError()])
def test_a_forecast_that_fails_stops_no_run(error, monkeypatch):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(planned, "plan_memory", fails)
    line = lk.check_memory(run(), 1)
    assert line.startswith("memory: there is no forecast (")
    assert "\n" not in line


@pytest.mark.usefixtures("forecasts")
def test_auto_is_refused_only_if_one_row_does_not_fit():
    auto = run(per_device_train_batch_size="auto", max_seq_length=1024)
    one = auto.with_rows(1).with_train(mlp_activations="recompute")
    memory = one.forecast().reserved
    assert "most in backward" in lk.check_memory(auto, memory)
    with pytest.raises(lk.LorakitError, match="and 200 kB are free"):
        lk.check_memory(auto, 200_000)
